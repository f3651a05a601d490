"""Passes are made when asked for, once, and end in unit vectors of full precision."""

import pytest
import torch

from siglip_train.batch import Batch
from siglip_train.errors import UserError
from siglip_train.objectives.forward_pass import ForwardPass
from tests.objectives.tiny import tiny_batch, tiny_model


def counting_model():
    model, calls = tiny_model(torch.float32), []
    model.vision.register_forward_hook(lambda *_: calls.append("image"))
    model.text.register_forward_hook(lambda *_: calls.append("text"))
    return model, calls


def test_each_pass_runs_once_and_only_on_demand():
    model, calls = counting_model()
    forward_pass = ForwardPass(model, tiny_batch(3, torch.float32))
    assert calls == []
    assert forward_pass.image.tokens.shape == (3, 4, 16)
    assert forward_pass.image_embedding is forward_pass.image_embedding
    assert calls == ["image"]
    assert forward_pass.text_embedding.shape == (3, 16)
    assert forward_pass.text.pooled.shape == (3, 16)
    assert calls == ["image", "text"]


def test_embeddings_are_those_of_the_model_s_encoders():
    model, batch = tiny_model(), tiny_batch(4)
    forward_pass = ForwardPass(model, batch)
    assert torch.equal(forward_pass.image_embedding, model.encode_image(batch.part("images")))
    assert torch.equal(forward_pass.text_embedding, model.encode_text(batch.part("texts")))


def test_embeddings_stay_in_fp32_under_autocast():
    model = tiny_model(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        forward_pass = ForwardPass(model, tiny_batch(4, torch.float32))
        images, texts = forward_pass.image_embedding, forward_pass.text_embedding
    for embedding in (images, texts):
        assert embedding.dtype == torch.float32
        # a norm rounded to bf16 would be off by up to 4e-3
        assert torch.allclose(embedding.norm(dim=1), torch.ones(4), atol=1e-6)


def test_passes_are_named_in_a_profile():
    forward_pass = ForwardPass(tiny_model(torch.float32), tiny_batch(2, torch.float32))
    with torch.profiler.profile() as profile:
        _ = forward_pass.image_embedding, forward_pass.text_embedding
    names = {event.name for event in profile.events()}
    assert {"forward/image", "forward/text", "forward/normalize"} <= names


def test_a_kept_pooled_output_takes_the_place_of_the_image_tower():
    (model, calls), batch = counting_model(), tiny_batch(3, torch.float32)
    pooled = model.vision(*batch.part("images")).pooled.half()
    calls.clear()
    forward_pass = ForwardPass(model, Batch({"texts": batch.part("texts"), "pooled": pooled}))
    assert forward_pass.image_embedding.dtype == torch.float32
    # measured 1.5e-4: float16 rounds each number by up to 5e-4 of itself
    torch.testing.assert_close(
        forward_pass.image_embedding, model.encode_image(batch.part("images")), rtol=0, atol=1e-3
    )
    assert torch.equal(forward_pass.image_pooled, pooled.float())
    assert calls == ["image"], "of the comparison"
    with pytest.raises(UserError, match=r"data\.embedding_dir"):
        _ = forward_pass.image_average
