"""What could open a door is hidden wherever text leaves the program, and what is no secret stays readable."""

import logging

import pytest

from siglip_train.data.remote.locations import lasting_name, short_name
from siglip_train.errors import UserError, exit_on_user_error
from siglip_train.redact import HIDDEN, RedactingFormatter, redacted, redacted_values

S = "S3cr3tABCDEFxyz012345678"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"https://host/a.tar?X-Amz-Signature={S}&x=1", "https://host/a.tar?X-Amz-Signature=***&x=***"),
        (f"https://host/a.tar?{S}", "https://host/a.tar?***"),
        (f"https://host/a.tar#access_token={S}", "https://host/a.tar#access_token=***"),
        (f"s3://key:{S}@bucket/{{0..9}}.tar", "s3://***@bucket/{0..9}.tar"),
        (f"https://{S}@host/a.tar", "https://***@host/a.tar"),
        (f"ftp://me:{S}p@ss@host/x", "ftp://***@host/x"),
        (f"['https://h/a?sig={S}', 'https://h/b?se=1']", "['https://h/a?sig=***', 'https://h/b?se=***']"),
        (f"403 for /a.tar?X-Amz-Credential={S}&X-Amz-Date=1", "403 for /a.tar?X-Amz-Credential=***&X-Amz-Date=***"),
        (
            f"pipe:curl -s -H 'Authorization: Bearer {S}' https://h/{{0..9}}.tar",
            "pipe:curl -s -H 'Authorization: ***' https://h/{0..9}.tar",
        ),
        (f'pipe:curl -H "X-Own: {S} a" https://h/a', 'pipe:curl -H "X-Own: ***" https://h/a'),
        (f"x.shards=pipe:curl --oauth2-bearer {S} https://h/a", "x.shards=pipe:curl --oauth2-bearer *** https://h/a"),
        (f"pipe:curl -u me:{S} https://h/a", "pipe:curl -u *** https://h/a"),
        (f"pipe:curl -ume:{S} https://h/a", "pipe:curl -u*** https://h/a"),
        (f"pipe:wget --password={S} -O - h/a", "pipe:wget --password=*** -O - h/a"),
        (f"pipe:wget --http-password {S} -O - h/a", "pipe:wget --http-password *** -O - h/a"),
        (f"pipe:sshpass -p '{S} b' ssh h cat a.tar", "pipe:sshpass -p *** ssh h cat a.tar"),
        (f"pipe:AWS_SECRET_ACCESS_KEY={S} aws s3 cp s3://b/a -", "pipe:AWS_SECRET_ACCESS_KEY=*** aws s3 cp s3://b/a -"),
        (f"pipe:get --with={S}= a.tar", "pipe:get --with=*** a.tar"),
        (f"pipe:get {S} a.tar", "pipe:get *** a.tar"),
        (f"pipe:get {'0a' * 20} a.tar", "pipe:get *** a.tar"),
        (f"AccountName=x;AccountKey={S}==;EndpointSuffix=y", "AccountName=x;AccountKey=***;EndpointSuffix=y"),
        (f"password: {S}", "password: ***"),
        (f'{{"api_key": "{S}"}}', '{"api_key": "***"}'),
        (f"Cookie: session={S}; b=2", "Cookie: ***"),
        (f"token={S}", "token=***"),
        ("with hf_abcdefghijklmnopqrst", "with ***"),
    ],
)  # fmt: skip
def test_secrets_are_hidden(text: str, expected: str) -> None:
    assert redacted(text) == expected
    assert redacted(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "step 3/10  loss 2.3456  1234 samples/s",
        "tokenizer: /a/b.model has 3 tokens: set model.text.vocab_size=1024",
        "pad_token: <pad>, eos_token: </s>, token: 5",
        "data.sources.a.shards=s3://b/{00000..41455}.tar::/data/0000?.tar",
        "s3://bucket/0000?.tar",
        "pipe:aws s3 cp s3://bucket/ImageNet1k-Train-000000000000.tar -",
        "pipe:cat /data/laion/{00000..00010}.tar",
        "the revision 0123456789abcdef0123456789abcdef01234567",
        "select={held_out: 0.1}, key=value, no such key: x",
        "see https://keepachangelog.com?",
        "basic information, the bearer of news, a secret ballot",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize(
    "unit", ["password", "-password-", "a-", "+=", "@", "://a@", "?a=", "-H 'a:", "Aa1", "token_"]
)
def test_a_long_text_made_to_be_slow_ends(unit: str) -> None:
    # in the square of its length, which nothing here times, this would take minutes
    text = f"pipe:{unit * (100_000 // len(unit))}"
    assert redacted(redacted(text)) == redacted(text)


def test_every_value_of_a_config_is_redacted() -> None:
    values = {"a": [f"token={S}", {"b": (f"https://u:{S}@h/x",)}], "c": 3, "d": None}
    assert redacted_values(values) == {"a": ["token=***", {"b": ["https://***@h/x"]}], "c": 3, "d": None}


def test_a_log_hides_secrets_of_arguments_and_tracebacks() -> None:
    try:
        raise OSError(f"https://h/a?sig={S}")
    except OSError as error:
        record = logging.LogRecord(
            "x", 30, "x", 1, "at %s", (f"https://h/b?sig={S}",), (OSError, error, None)
        )
    text = RedactingFormatter("%(message)s").format(record)
    assert S not in text
    assert text.count("sig=***") == 2


def test_the_error_line_and_an_unforeseen_traceback_hide_secrets(capsys) -> None:
    @exit_on_user_error
    def main() -> None:
        raise UserError(f"cannot read https://h/a?sig={S}")

    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == "error: cannot read https://h/a?sig=***\n"


def test_a_shard_is_named_without_secrets() -> None:
    assert short_name(f"https://h/b/a.tar?sig={S}") == "a.tar"
    assert S not in short_name(f"pipe:curl https://h/a.tar -H 'Authorization: Bearer {S}'")
    # what changes does not make another shard of it, where it can be told
    assert lasting_name(f"https://me:{S}@h/a.tar?sig=1") == lasting_name("https://me:x@h/a.tar?sig=2")
    assert lasting_name(f"pipe:get {S}") != lasting_name(f"pipe:get {S}1")
    assert S not in lasting_name(f"pipe:get {S}")
    assert lasting_name("/data/a?.tar") == "/data/a?.tar"
    assert HIDDEN not in short_name("/data/00000.tar")
