import pytest

from siglip_train.data.prompts import canonicalise, fill, read_class_names, read_templates
from siglip_train.errors import UserError


def test_canonical_text_has_no_case_punctuation_or_underscore():
    assert canonicalise("A photo_of a  T. rex, (large)!") == "a photo of a t rex large"


@pytest.mark.parametrize(
    ("template", "name", "prompt"),
    [
        ("a {c}.", "red fox", "a red fox."),
        ("a {} in {}", "hen", "a hen in hen"),
        ("{c} and {}", "hen", "hen and {}"),
        ("a {} with {braces}", "{odd} name", "a {odd} name with {braces}"),
    ],
)
def test_only_the_place_of_the_name_is_filled(template, name, prompt):
    assert fill(template, name) == prompt


def test_files_give_one_entry_a_line(tmp_path):
    names = tmp_path / "classnames.txt"
    names.write_text("tench\r\ngrüner Fisch\n  hen  \n\n", encoding="utf-8")
    assert read_class_names(str(names)) == ["tench", "grüner Fisch", "hen"]
    templates = tmp_path / "templates.txt"
    templates.write_text("a {c}\nthe {}.\n", encoding="utf-8")
    assert read_templates(str(templates)) == ["a {c}", "the {}."]


def test_the_well_known_lists_have_their_sizes():
    names, templates = read_class_names("imagenet"), read_templates("openai")
    assert (len(names), names[0], len(templates)) == (1000, "tench", 80)
    assert "a bad photo of a {}." in templates


def test_mistakes_are_named(tmp_path):
    missing = str(tmp_path / "none.txt")
    with pytest.raises(UserError, match=r"none\.txt"):
        read_class_names(missing)
    gap = tmp_path / "gap.txt"
    gap.write_text("one\n\nthree\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 2"):
        read_class_names(str(gap))
    with pytest.raises(UserError, match="no class name in the list"):
        read_class_names([])
    with pytest.raises(UserError, match=r"'a photo'.*no place"):
        read_templates(["a {}", "a photo"])
