"""An exported model is the model: logits, tokens, conversations and greedy decoding agree.

B batch, T time, V vocabulary
"""

import ast
import functools
import json
import os
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from tiny_models import TEXT
from tiny_models import tiny_model as any_tiny_model

from nanochat.errors import UserError
from nanochat.export import hf
from nanochat.export import tokenizer as hf_tokenizer
from nanochat.gpt import GPT
from nanochat.infer.engine import Engine
from nanochat.infer.sampling import SamplingParams
from nanochat.tokenizer import Tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.models.nanochat")
from nanochat.export.modeling_nanochat_full import CACHE_FIELD, Visibility  # noqa: E402

PORTABLE = {
    "windows": (),
    "value_embeddings": False,
    "residual_scalars": False,
    "token_shift": False,
    "spelling_bytes": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "portable": PORTABLE,
    "portable, one key head, longer context": {
        **PORTABLE,
        "n_kv_head": 1,
        "rope_base": 70000.0,
        "trained_context_length": 48,
    },
    "full": {},
    "full, longer context": {
        "windows": (6, 6, 0),
        "rope_base": 50000.0,
        "windowed_rope_base": 9000.0,
        "trained_context_length": 48,
        "spelling_bytes": 0,
    },
    "value embeddings alone": {
        "windows": (),
        "residual_scalars": False,
        "token_shift": False,
        "spelling_bytes": 0,
        "n_kv_head": 4,
    },
    "scalars alone": {"windows": (), "value_embeddings": False, "token_shift": False},
    "token shift alone": {"windows": (), "value_embeddings": False, "residual_scalars": False},
    "portable but for its spelling": {**PORTABLE, "spelling_bytes": 3},
    "narrow heads": {**PORTABLE, "head_dim": 4},
}


@cache
def tiny_tokenizer() -> Tokenizer:
    """The vocabulary's size is no multiple of 64, so that the model has padding rows."""
    return Tokenizer.train([TEXT] * 3, 300)


def tiny_model(**settings: Any) -> GPT:
    """A model that never ends its answer."""
    model = any_tiny_model(**{"vocab_size": tiny_tokenizer().vocab_size, **settings})
    with torch.no_grad():
        for name in ("<|assistant_end|>", "<|bos|>"):
            model.head.weight[tiny_tokenizer().special(name)] = 0
    return model


@pytest.fixture(autouse=True)
def _module_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any) -> None:
    """Code that comes with a model is copied to a cache: not to the user's."""
    cache = str(tmp_path_factory.getbasetemp() / "modules")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture(scope="module", params=MODELS)
def exported(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT, Path]:
    model = tiny_model(**MODELS[request.param])
    folder = tmp_path_factory.mktemp("export") / "model"
    hf.export(model, tiny_tokenizer(), folder)
    return model, folder


def load(folder: Path, **options: Any) -> Any:
    portable = not (folder / hf.MODELING_FILE).exists()
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=not portable, **options
    ).eval()


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, tiny_tokenizer().vocab_size, shape, generator=generator)


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids -> ids and attention mask (B, longest), the padding's ids arbitrary."""
    longest = max(len(row) for row in rows)
    ids, mask = random_ids(len(rows), longest, seed=9), torch.zeros(len(rows), longest)
    for b, row in enumerate(rows):
        ids[b, longest - len(row) :] = row
        mask[b, longest - len(row) :] = 1
    return ids, mask.long()


# Logits


@torch.no_grad()
def test_logits_are_equal(exported: tuple[GPT, Path]) -> None:
    model, folder = exported
    theirs = load(folder)
    config = json.loads((folder / "config.json").read_text())
    expected_type = "nanochat" if model.config.is_portable else "nanochat_full"
    assert config["model_type"] == theirs.config.model_type == expected_type
    assert config["vocab_size"] == tiny_tokenizer().vocab_size < model.config.padded_vocab_size
    ends = [tiny_tokenizer().special(name) for name in ("<|assistant_end|>", "<|bos|>")]
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == ends
    ids = random_ids(3, 96)
    logits = theirs(ids).logits
    assert logits.shape == (3, 96, tiny_tokenizer().vocab_size)
    # Logits go up to 15, where one float32 step is 1e-6: CPUs differ by some ten of them.
    torch.testing.assert_close(logits, model(ids), rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[40] + [1] * 20, [1] * 30, [7, 30, 1, 20]])
def test_logits_are_equal_with_a_cache(exported: tuple[GPT, Path], chunks: list[int]) -> None:
    model, folder = exported
    theirs = load(folder)
    ids = random_ids(2, sum(chunks))
    past, pieces = None, []
    for piece in ids.split(chunks, dim=1):
        output = theirs(piece, **{CACHE_FIELD: past}, use_cache=True)
        past = output[CACHE_FIELD]
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), rtol=0, atol=1e-5)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(exported: tuple[GPT, Path]) -> None:
    model, folder = exported
    theirs = load(folder)
    rows = [random_ids(n, seed=n) for n in (23, 9, 1)]
    ids, mask = left_padded(rows)
    new = random_ids(3, 6, seed=5)
    first = theirs(ids, attention_mask=mask, use_cache=True)
    logits, past = [first.logits], first[CACHE_FIELD]
    for t in range(6):
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
        output = theirs(new[:, t : t + 1], attention_mask=mask, **{CACHE_FIELD: past})
        logits.append(output.logits)
    together = torch.cat(logits, dim=1)
    assert together.isfinite().all()
    for b, row in enumerate(rows):
        expected = model(torch.cat((row, new[b]))[None])[0]
        torch.testing.assert_close(together[b, -len(expected) :], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_cache_has_two_names_and_other_keywords_are_errors(tmp_path: Path) -> None:
    """A keyword that is swallowed unseen is how a renamed cache decoded without its past."""
    model = tiny_model()
    hf.export(model, tiny_tokenizer(), tmp_path / "out")
    theirs = load(tmp_path / "out")
    ids = random_ids(1, 9)
    for name in ("cache", "past_key_values"):
        cache = transformers.DynamicCache()
        theirs(ids[:, :8], **{name: cache})
        logits = theirs(ids[:, 8:], **{name: cache}).logits
        torch.testing.assert_close(logits[:, 0], model(ids)[:, 8], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="same argument"):
        theirs(ids, cache=cache, past_key_values=cache)
    with pytest.raises(TypeError, match=r"does not know past_keys=1"):
        theirs(ids, past_keys=1)
    assert theirs(ids, output_attentions=False, return_dict=False)[0].shape[:2] == (1, 9)


def test_names_for_mlx(tmp_path: Path) -> None:
    """A renaming, one to one; the base that mlx-lm reads stands in the configuration."""
    from safetensors.torch import load_file

    model = tiny_model(**{**PORTABLE, "rope_base": 70000.0})
    for names in ("transformers", "mlx"):
        assert hf.export(model, tiny_tokenizer(), tmp_path / names, texts=5, names=names)
    plain = load_file(tmp_path / "transformers" / "model.safetensors")
    mlx = load_file(tmp_path / "mlx" / "model.safetensors")
    assert len(mlx) == len(plain)
    for name, tensor in plain.items():
        assert mlx[hf.mlx_name(name)].equal(tensor)
    block = {"attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    expected = {f"transformer.h.{i}.{part}.weight" for i in range(3) for part in block}
    assert set(mlx) == {"transformer.wte.weight", "lm_head.weight", *expected}
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert config["rope_theta"] == 70000.0
    assert config["model_type"] == "nanochat"
    card = (tmp_path / "mlx" / "README.md").read_text(encoding="utf-8")
    assert "mlx_lm.generate" in card
    assert "AutoModel" not in card
    for settings, words in (
        ({}, "trained with --portable"),
        ({**PORTABLE, "softcap": 20.0}, "a softcap of 15; this model has 20"),
        ({**PORTABLE, "head_dim": 4}, "heads that do not fill the width"),
    ):
        with pytest.raises(UserError, match=words):
            hf.export(tiny_model(**settings), tiny_tokenizer(), tmp_path / "no", names="mlx")


# Training


def packed(model: Any, lengths: list[int], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and logits of a row that holds documents of these lengths."""
    ids = random_ids(1, sum(lengths), seed=3)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return ids, model(ids, position_ids=positions, **options).logits


@torch.no_grad()
def test_documents_packed_into_a_row_do_not_see_each_other(exported: tuple[GPT, Path]) -> None:
    """Trainers pack rows without padding, with position_ids that begin anew."""
    model, folder = exported
    theirs = load(folder)
    lengths = [11, 1, 1, 23, 7]
    starts = [sum(lengths[:i]) for i in range(6)]
    ids, logits = packed(theirs, lengths, use_cache=False)
    options: list[dict[str, Any]] = [{}]
    if not model.config.is_portable:
        assert packed(theirs, lengths)[1].equal(logits)  # by default no cache is made for them
        bounds = torch.tensor(starts, dtype=torch.int32)
        ends = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 23}
        options += [{"attention_mask": torch.ones_like(ids)}, {**ends, "seq_idx": ids}]
    for more in options:
        assert packed(theirs, lengths, use_cache=False, **more)[1].equal(logits)
    for start, end in pairwise(starts):
        alone = model(ids[:, start:end])
        torch.testing.assert_close(logits[:, start:end], alone, rtol=0, atol=1e-5)
    # One row holds several documents, the other one; padding is passed over, whatever its position.
    both = random_ids(2, 20, seed=4)
    mask = torch.ones_like(both)
    mask[0, :3] = mask[1, 17:] = 0
    positions = torch.stack(
        [torch.cat([torch.tensor([1, 1, 0]), torch.arange(10), torch.arange(7)]), torch.arange(20)]
    )
    positions[1, 17:] = 0
    if model.config.is_portable:
        return  # transformers reads packing from the positions only where there is no mask
    logits = theirs(both, attention_mask=mask, position_ids=positions).logits
    for b, start, end in ((0, 3, 13), (0, 13, 20), (1, 0, 17)):
        alone = model(both[b : b + 1, start:end])
        torch.testing.assert_close(logits[b : b + 1, start:end], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_hole_of_padding_begins_no_document(tmp_path: Path) -> None:
    hf.export(tiny_model(), tiny_tokenizer(), tmp_path / "out")
    theirs = load(tmp_path / "out")
    ids, mask = random_ids(1, 12), torch.ones(1, 12, dtype=torch.long)
    mask[0, 5:7] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    logits = theirs(ids, attention_mask=mask, position_ids=positions).logits
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % tiny_tokenizer().vocab_size
    others = theirs(changed, attention_mask=mask, position_ids=positions).logits
    assert not torch.allclose(logits[0, -1], others[0, -1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_packing_that_contradicts_itself_is_an_error(tmp_path: Path) -> None:
    hf.export(tiny_model(), tiny_tokenizer(), tmp_path / "out")
    theirs = load(tmp_path / "out")
    ids, bounds = random_ids(1, 9), torch.tensor([0, 4, 9])
    for positions in (None, torch.arange(9)[None]):
        with pytest.raises(ValueError, match="names 2 documents and position_ids 1"):
            theirs(ids, position_ids=positions, cu_seq_lens_q=bounds)
    with pytest.raises(ValueError, match="no cache can be filled"):
        packed(theirs, [4, 5], **{CACHE_FIELD: transformers.DynamicCache()})


def test_gradient_checkpointing_changes_nothing(exported: tuple[GPT, Path]) -> None:
    theirs = load(exported[1]).train()
    ids = random_ids(2, 30)

    def gradients() -> list[torch.Tensor]:
        theirs.zero_grad()
        output = theirs(ids, labels=ids, use_cache=False)
        output.loss.backward()
        return [output.loss.detach(), *(p.grad for p in theirs.parameters())]

    expected = gradients()
    if hasattr(theirs, "activation_checkpointing_enable"):
        theirs.activation_checkpointing_enable()
    else:  # before transformers 5.24
        theirs.gradient_checkpointing_enable()
    calls = 0

    def count(*arguments: Any) -> None:
        nonlocal calls
        calls += 1

    for layer in theirs.model.layers:
        layer.self_attn.q_proj.register_forward_hook(count)
    torch.testing.assert_close(gradients(), expected, rtol=0, atol=0)
    assert calls == 2 * len(theirs.model.layers)  # each layer once more, in the backward pass
    if exported[0].config.is_portable:
        return
    assert getattr(theirs(ids, use_cache=True), CACHE_FIELD) is None
    with pytest.raises(ValueError, match="no cache can be filled with gradient checkpointing"):
        theirs(ids, **{CACHE_FIELD: transformers.DynamicCache()})
    theirs.eval()
    assert theirs(ids)[CACHE_FIELD] is not None


@torch.no_grad()
def test_use_cache(exported: tuple[GPT, Path]) -> None:
    theirs = load(exported[1])
    ids = random_ids(1, 5)
    assert getattr(theirs(ids, use_cache=False), CACHE_FIELD) is None
    assert getattr(theirs(ids), CACHE_FIELD).get_seq_length() == 5
    if not exported[0].config.is_portable:
        assert getattr(theirs.train()(ids), CACHE_FIELD) is None


@torch.no_grad()
def test_embeddings_instead_of_ids(exported: tuple[GPT, Path]) -> None:
    model, folder = exported
    theirs = load(folder)
    ids = random_ids(2, 8)
    embeds = theirs.get_input_embeddings()(ids)
    if model.config.value_embeddings:
        with pytest.raises(ValueError, match="this model needs input_ids"):
            theirs(inputs_embeds=embeds)
    else:
        assert theirs(inputs_embeds=embeds).logits.equal(theirs(ids).logits)
    with pytest.raises(ValueError, match="input_ids"):
        theirs(ids, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="input_ids"):
        theirs()


def test_labels_are_all_that_the_trainer_needs_for_a_loss(exported: tuple[GPT, Path]) -> None:
    theirs = load(exported[1])
    assert transformers.utils.find_labels(type(theirs)) == ["labels"]
    ids = random_ids(2, 8)
    expected = theirs(ids, labels=ids).loss
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    assert theirs(ids, labels=ids, shift_labels=shifted).loss.equal(expected)
    assert theirs(ids, labels=ids, num_items_in_batch=28).loss.item() == pytest.approx(
        expected.item() / 2
    )


@torch.no_grad()
def test_the_model_below_the_head(exported: tuple[GPT, Path]) -> None:
    """Trainers that never build all logits call it alone, with the same keywords."""
    theirs = load(exported[1])
    ids = random_ids(2, 8)
    mask = torch.ones_like(ids)
    output = theirs.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    cap = theirs.config.final_logit_softcapping
    logits = cap * torch.tanh(theirs.get_output_embeddings()(output.last_hidden_state) / cap)
    torch.testing.assert_close(logits, theirs(ids).logits, rtol=0, atol=1e-5)


def test_the_check_sees_a_cache_that_is_dropped(tmp_path: Path, monkeypatch: Any) -> None:
    from nanochat.export.modeling_nanochat_full import NanoChatFullForCausalLM

    forward = NanoChatFullForCausalLM.forward

    def forgetful(self: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        options.update(cache=None, past_key_values=None)
        if "attention_mask" in options:
            options["attention_mask"] = options["attention_mask"][..., -input_ids.shape[1] :]
        return forward(self, input_ids, **options)

    wrapped = functools.wraps(forward)(forgetful)  # generate reads the signature
    monkeypatch.setattr(NanoChatFullForCausalLM, "forward", wrapped)
    with pytest.raises(RuntimeError, match="decoded with a dynamic cache differ"):
        hf.export(tiny_model(), tiny_tokenizer(), tmp_path / "out", texts=1)


def test_padding_sees_itself() -> None:
    """A softmax over no key at all is not defined, and not every backend says 0."""
    mask = torch.tensor([[0, 0, 0, 1, 1]])
    for past, T in ((0, 5), (2, 3)):
        visible = Visibility(mask, past, T)(2, 5, mask.device)
        assert visible is not None
        assert visible.any(dim=-1).all()


@torch.no_grad()
def test_padding_on_the_right_changes_nothing(exported: tuple[GPT, Path]) -> None:
    model, folder = exported
    ids = random_ids(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, 11:] = 0
    logits = load(folder)(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[0, :11], model(ids[:1, :11])[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_loss_is_equal(exported: tuple[GPT, Path]) -> None:
    model, folder = exported
    ids = random_ids(2, 30)
    ours = model.nll(ids[:, :-1], ids[:, 1:]).mean()
    torch.testing.assert_close(load(folder)(ids, labels=ids).loss, ours, rtol=0, atol=1e-5)


@torch.no_grad()
def test_weights_in_another_dtype(tmp_path: Path) -> None:
    for settings in ({}, PORTABLE):
        model = tiny_model(**settings)
        result = hf.export(model, tiny_tokenizer(), tmp_path / "out", dtype=torch.bfloat16, texts=3)
        assert result is not None
        assert result.largest_difference < 1e-5
        assert load(tmp_path / "out").dtype == torch.bfloat16
        model = model.plain()
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        theirs = load(tmp_path / "out", dtype=torch.float32)
        ids = random_ids(1, 50)
        torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=0, atol=1e-5)


# Generation


def engine_ids(model: GPT, prompts: list[list[int]]) -> list[list[int]]:
    engine = Engine(model, tiny_tokenizer(), tools=False)
    params = SamplingParams(temperature=0, max_tokens=64)
    return [samples[0].ids for samples in engine.generate(prompts, params)]


def prompts() -> list[list[int]]:
    tokenizer = tiny_tokenizer()
    texts = ["the king went to the sea and said", "12 + 34", "東京"]
    conversations = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    return [tokenizer.render_for_completion(conversation) for conversation in conversations]


def generate(folder: Path, texts: list[list[int]], **options: Any) -> list[list[int]]:
    """Greedy, as one batch padded by the exported tokenizer; without what follows the end."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    inputs = tokenizer.pad({"input_ids": texts}, return_tensors="pt")
    model = load(folder)
    output = model.generate(**inputs, max_new_tokens=64, **options)
    rows = output[:, inputs["input_ids"].shape[1] :].tolist()
    ends = set(model.generation_config.eos_token_id)
    return [
        row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))]
        for row in rows
    ]


def test_greedy_decoding_is_the_engines(exported: tuple[GPT, Path]) -> None:
    model, folder = exported
    expected = engine_ids(model, prompts())
    assert [generate(folder, [prompt])[0] for prompt in prompts()] == expected
    assert {len(ids) for ids in expected} == {64}


def test_greedy_decoding_of_a_padded_batch_is_the_engines(exported: tuple[GPT, Path]) -> None:
    model, folder = exported
    assert generate(folder, prompts()) == engine_ids(model, prompts())


def test_a_prompt_without_a_mask_is_read_whole(exported: tuple[GPT, Path]) -> None:
    """The padding is <|bos|>, with which every prompt begins: it must not be taken for padding."""
    model, folder = exported
    prompt = prompts()[0]
    output = load(folder).generate(torch.tensor([prompt]), max_new_tokens=64)
    assert output[0, len(prompt) :].tolist() == engine_ids(model, [prompt])[0]


@pytest.mark.parametrize("settings", [{}, {"windows": (6, 6, 0)}])
def test_a_static_cache_and_beams(settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(**settings)
    hf.export(model, tiny_tokenizer(), tmp_path / "out")
    expected = engine_ids(model, prompts())
    assert generate(tmp_path / "out", prompts(), cache_implementation="static") == expected
    assert generate(tmp_path / "out", prompts(), use_cache=False) == expected
    with_cache = generate(tmp_path / "out", prompts(), num_beams=3)
    assert with_cache == generate(tmp_path / "out", prompts(), num_beams=3, use_cache=False)


def test_a_loop_of_ones_own_over_a_cache(tmp_path: Path) -> None:
    """The cache keeps what the token shift needs; another model's cache cannot, and says so."""
    model = tiny_model()
    hf.export(model, tiny_tokenizer(), tmp_path / "out")
    loaded = load(tmp_path / "out")
    ids = torch.tensor([prompts()[0][:8], prompts()[1][:8]])
    expected = loaded(ids).logits
    cache = transformers.DynamicCache()
    for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:]):
        logits = loaded(part, past_key_values=cache).logits
    torch.testing.assert_close(logits, expected[:, 6:], atol=1e-4, rtol=0)
    foreign = transformers.DynamicCache()
    loaded(ids[:, :5], past_key_values=foreign)
    del foreign.last_embedding
    with pytest.raises(ValueError, match="previous_ids"):
        loaded(ids[:, 5:], past_key_values=foreign)
    logits = loaded(ids[:, 5:], past_key_values=foreign, previous_ids=ids[:, 4]).logits
    torch.testing.assert_close(logits, expected[:, 5:], atol=1e-4, rtol=0)


def test_generation_ends_where_the_engine_ends(tmp_path: Path) -> None:
    """At <|assistant_end|> and at <|bos|>."""
    tokenizer = tiny_tokenizer()
    for name in ("<|assistant_end|>", "<|bos|>"):
        model = tiny_model(**PORTABLE)
        wanted = tokenizer.special(name)
        ids = engine_ids(model, [prompts()[0]])[0]
        with torch.no_grad():  # the end becomes the most likely token where the 20th one was
            model.head.weight[wanted] = 1.1 * model.head.weight[ids[20]]
        hf.export(model, tokenizer, tmp_path / name)
        expected = engine_ids(model, [prompts()[0]])[0]
        assert expected[-1] == wanted
        assert len(expected) <= 21
        assert generate(tmp_path / name, [prompts()[0]])[0] == expected


# The folder


def test_a_tensor_without_a_counterpart_is_an_error(tmp_path: Path) -> None:
    model = tiny_model()
    model.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(UserError, match="extra has no counterpart"):
        hf.export(model, tiny_tokenizer(), tmp_path / "out")
    model = tiny_model()
    model.blocks[1].mlp.second = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"blocks\.1\.mlp\.second\.weight has no counterpart"):
        hf.export(model, tiny_tokenizer(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_the_target_lacks_or_shapes_otherwise_is_an_error(tmp_path: Path) -> None:
    model = tiny_model(**PORTABLE)
    model.residual_scale = nn.Parameter(torch.zeros(3))  # it has a name, but not in this type
    with pytest.raises(UserError, match=r"residual_scale is .*expected missing"):
        hf.export(model, tiny_tokenizer(), tmp_path / "out")
    model = tiny_model()
    model.blocks[0].attention.out.weight = nn.Parameter(torch.zeros(32, 31))
    with pytest.raises(UserError, match=r"o_proj.weight is \(32, 31\), expected \(32, 32\)"):
        hf.export(model, tiny_tokenizer(), tmp_path / "out")
    model = tiny_model()
    del model.first_scale
    with pytest.raises(UserError, match="first_scale is missing"):
        hf.export(model, tiny_tokenizer(), tmp_path / "out")


def test_a_folder_that_fails_the_check_is_not_written(tmp_path: Path, monkeypatch: Any) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    names = dict(hf._IN_BLOCK)
    names["attention.query"], names["attention.out"] = (
        names["attention.out"],
        names["attention.query"],
    )
    with monkeypatch.context() as patch:
        patch.setattr(hf, "_IN_BLOCK", names)
        with pytest.raises(RuntimeError, match="logits of the exported model differ"):
            hf.export(model, tokenizer, tmp_path / "out", texts=1)
    with monkeypatch.context() as patch:
        patch.setattr(hf_tokenizer, "oniguruma_pattern", lambda pattern: r"\s+|\S+")
        with pytest.raises(RuntimeError, match=r"encodes .* differently"):
            hf.export(model, tokenizer, tmp_path / "out", texts=100)
    assert list(tmp_path.iterdir()) == []
    assert hf.export(model, tokenizer, tmp_path / "out", texts=100) is not None


def test_only_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    hf.export(tiny_model(), tiny_tokenizer(), out)
    assert (out / hf.MODELING_FILE).exists()
    hf.export(tiny_model(**PORTABLE), tiny_tokenizer(), out)
    assert not (out / hf.MODELING_FILE).exists()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        hf.export(tiny_model(), tiny_tokenizer(), out)
    assert (out / "thesis.txt").exists()
    with pytest.raises(UserError, match="load the tokenizer the model was trained with"):
        hf.export(tiny_model(vocab_size=400), tiny_tokenizer(), tmp_path / "other")


def test_a_checkpoint_without_a_run_configuration(tmp_path: Path) -> None:
    hf.export(
        tiny_model(**PORTABLE), tiny_tokenizer(), tmp_path / "model", meta={"run_config": None}
    )


def test_the_folder_holds_nothing_else(exported: tuple[GPT, Path]) -> None:
    model, folder = exported
    files = {path.name for path in folder.iterdir()}
    assert files == set(hf.FILES) - ({hf.MODELING_FILE} if model.config.is_portable else set())


def test_the_modelling_file_needs_only_torch_and_transformers(exported: tuple[GPT, Path]) -> None:
    model, folder = exported
    if model.config.is_portable:
        return
    tree = ast.parse((folder / hf.MODELING_FILE).read_text())
    imported = {
        alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names
    }
    imported |= {n.module or "." for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    allowed = sys.stdlib_module_names | {"torch", "transformers"}
    assert {name.partition(".")[0] for name in imported} <= allowed


# The tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """Ours and the exported one, with merges of all kinds."""
    texts = [TEXT, "aaaa aaaaaaaa aaa ababab abab bababa ", "I'll don't 'S 12345 67\n\n  \n\t x"]
    tokenizer = Tokenizer.train([*texts * 3, *hf.random_texts(300, seed=1)], 900)
    folder = tmp_path_factory.mktemp("export") / "tokenizer"
    hf_tokenizer.hf_tokenizer(tokenizer, 96).save_pretrained(folder)
    return tokenizer, transformers.AutoTokenizer.from_pretrained(folder)


def compare(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text)
    assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == ids, text
    assert theirs.decode(ids) == text


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_texts_are_encoded_alike(tokenizers: tuple[Tokenizer, Any], count: int) -> None:
    ours, theirs = tokenizers
    for text in hf.random_texts(count, seed=2):
        compare(ours, theirs, text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "a \n b  \n\n c   ",  # what `$` must not match at: the ends of lines
        "1234567890 12 1 123",
        "I'll I'LL it'\u017f don'T 'Ve we're '\u212a",
        "aaaaaaa" * 50 + "b" * 3,
        " \u00a0\u2003\u3000 x\u0085y\u2028z",
        "\u0061\u0301\U0001f468\u200d\U0001f469\u200d\U0001f467\ufffd\ufeff\x00",
        "text <|bos|> and <|user_end|> <|assistant_en",
    ],
)
def test_difficult_texts_are_encoded_alike(tokenizers: tuple[Tokenizer, Any], text: str) -> None:
    compare(*tokenizers, text)


def test_bytes_that_are_no_text_are_decoded_alike(tokenizers: tuple[Tokenizer, Any]) -> None:
    ours, theirs = tokenizers
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        ids = torch.randint(0, ours.vocab_size, (12,), generator=generator).tolist()
        assert theirs.decode(ids) == ours.decode(ids)


def test_special_tokens(tokenizers: tuple[Tokenizer, Any]) -> None:
    ours, theirs = tokenizers
    assert len(theirs) == ours.vocab_size
    for name in ours.SPECIAL_TOKENS:
        wanted = ours.special(name)
        assert theirs.convert_tokens_to_ids(name) == wanted
        assert theirs.encode(name, add_special_tokens=False) == [wanted]
        assert theirs.decode([wanted]) == ours.decode([wanted]) == name
        assert theirs.decode([wanted], skip_special_tokens=True) == ""
        # Ours never takes text for a special token; theirs does unless told otherwise.
        text = f"a{name} b"
        assert wanted not in ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == [
            *ours.encode("a"),
            wanted,
            *ours.encode(" b"),
        ]
        compare(ours, theirs, text)
    assert theirs.bos_token_id == theirs.pad_token_id == ours.bos
    assert theirs.eos_token_id == ours.special("<|assistant_end|>")


def test_a_text_becomes_a_pretraining_document(tokenizers: tuple[Tokenizer, Any]) -> None:
    ours, theirs = tokenizers
    assert theirs("the sea")["input_ids"] == [ours.bos, *ours.encode("the sea")]
    batch = theirs(["the sea", "a"], padding=True)
    padding = len(batch["input_ids"][0]) - 2
    assert batch["attention_mask"][1] == [0] * padding + [1, 1]  # on the left
    assert set(batch) == {"input_ids", "attention_mask"}


def test_merges_rebuild_the_vocabulary() -> None:
    ranks = tiny_tokenizer().ranks
    merges = hf_tokenizer.bpe_merges(ranks)
    assert [ranks[a] + ranks[b] for a, b in merges] == ranks[256:]
    assert all(max(pair) < 256 + i for i, pair in enumerate(merges))
    with pytest.raises(UserError, match="is no merge of two tokens before it"):
        hf_tokenizer.bpe_merges([*ranks, b"\xff\xfe\xfd"])


# Conversations


def conversations() -> list[dict[str, Any]]:
    from tasks.arithmetic import Arithmetic
    from tasks.spellingbee import SpellingBee

    path = Path(__file__).parents[2] / "tasks" / "data" / "identity_conversations.jsonl"
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:60]]
    for task in (SpellingBee("train", 12), Arithmetic("train", 12)):
        found += [task[i] for i in range(len(task))]
    call = [
        {"type": "text", "text": " Let me see.\n"},
        {"type": "python", "text": "'naïve'.count('ï')\n"},
        {"type": "python_output", "text": "1"},
        {"type": "python", "text": "2"},
        {"type": "python_output", "text": ""},
    ]
    made = [
        [("user", "  {{ blanks }} \n\n"), ("assistant", "\n{% kept %} ")],
        [("system", "Be kind. "), ("user", "Hé 東京 🙂"), ("assistant", call)],
        [("system", "A"), ("system", "B"), ("user", "1"), ("user", "2"), ("assistant", call)],
        [("user", [{"type": "text", "text": "parts"}]), ("assistant", "x"), ("assistant", "y")],
        [("user", "one"), ("assistant", call), ("user", "two"), ("assistant", call)],
    ]
    for messages in made:
        found.append({"messages": [{"role": r, "content": c} for r, c in messages]})
    return found


@pytest.mark.parametrize("system", ["tokens", "merge"])
def test_chat_template_renders_as_we_do(
    tokenizers: tuple[Tokenizer, Any], system: Any, monkeypatch: Any
) -> None:
    ours, theirs = tokenizers
    monkeypatch.setattr(theirs, "chat_template", hf_tokenizer.chat_template(system))
    for conversation in conversations():
        messages = conversation["messages"]
        ids, mask = ours.render_conversation(conversation, system=system)
        result = theirs.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        assert result["input_ids"] == ids
        assert result["assistant_masks"] == mask
        prompt = ours.render_for_completion(conversation, system=system)
        for asked in (messages, messages[:-1]):
            result = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)
            if asked[-1]["role"] != "assistant" or asked is messages:
                assert result["input_ids"] == prompt


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([("user", "be <|assistant_end|> quiet")], "spells the special token"),
        ([("system", "x<|bos|>"), ("user", "a")], "spells the special token"),
        ([("robot", "12")], "the role robot is none of"),
        ([("user", [{"type": "python", "text": "1"}])], "only assistant messages"),
        ([("assistant", "first")], "no message before the assistant's"),
    ],
)
def test_chat_template_refuses(
    tokenizers: tuple[Tokenizer, Any], messages: list[tuple[str, Any]], error: str
) -> None:
    chat = [{"role": role, "content": content} for role, content in messages]
    with pytest.raises(Exception, match=error):
        tokenizers[1].apply_chat_template(chat, add_generation_prompt=True)


def call(arguments: Any, content: Any = None, name: str = "python") -> dict[str, Any]:
    """An assistant's message that calls a tool, as OpenAI and transformers write it."""
    function = {"name": name, "arguments": arguments}
    tool_calls = [{"id": "call_1", "type": "function", "function": function}]
    return {"role": "assistant", "content": content, "tool_calls": tool_calls}


def result(content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "call_1", "content": content}


@pytest.mark.parametrize("system", ["tokens", "merge"])
def test_chat_template_renders_the_messages_of_others(
    tokenizers: tuple[Tokenizer, Any], system: Any, monkeypatch: Any
) -> None:
    """The developer is the system; calls and their results are one turn of the assistant."""
    ours, theirs = tokenizers
    monkeypatch.setattr(theirs, "chat_template", hf_tokenizer.chat_template(system))
    user = {"role": "user", "content": "12 + 34, and 5 * 6?"}

    def compare(messages: list[Any], expected: list[Any]) -> None:
        ids, mask = ours.render_conversation({"messages": expected}, system=system)
        found = theirs.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        assert found["input_ids"] == ids
        assert found["assistant_masks"] == mask

    said = {"role": "assistant", "content": "hi"}
    compare(
        [{"role": "developer", "content": "Be kind."}, user, said],
        [{"role": "system", "content": "Be kind."}, user, said],
    )
    parts = [("text", "See: "), ("python", "12 + 34"), ("python_output", "46")]
    parts += [("python", "5 * 6"), ("python_output", "30"), ("text", "46 and 30")]
    turn = [{"type": kind, "text": text} for kind, text in parts]
    messages = [
        user,
        call({"code": "12 + 34"}, "See: "),
        result("46"),
        call({"code": "5 * 6"}),
        result([{"type": "text", "text": "30"}]),
        {"role": "assistant", "content": "46 and 30", "tool_calls": None},
    ]
    compare(messages, [user, {"role": "assistant", "content": turn}])
    compare([*messages, user, said], [user, {"role": "assistant", "content": turn}, user, said])
    last = {"role": "assistant", "content": turn[:3]}
    compare(messages[:3], [user, last])
    compare([*messages[:3], user, said], [user, last, user, said])
    # The model goes on where the result stands, in the same turn.
    going_on = theirs.apply_chat_template(messages[:3], add_generation_prompt=True)
    assert going_on["input_ids"] == ours.render_conversation({"messages": [user, last]})[0][:-1]


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([call('{"code": "1"}')], "arguments as an object"),
        ([call({"a": "1", "b": "2"})], "one argument, its text"),
        ([call({"code": 5})], "one argument, its text"),
        ([call({"code": "1"}) | {"tool_calls": [{}, {}]}], "one call"),
        ([result("5")], "follows no call"),
        ([{"role": "assistant", "content": "x"}, result("5")], "follows no call"),
        ([call({"code": "1"}), result("5"), result("6")], "follows no call"),
        ([call({"code": "<|bos|>"})], "spells the special token"),
    ],
)
def test_chat_template_refuses_calls_it_cannot_render(
    tokenizers: tuple[Tokenizer, Any], messages: list[Any], error: str
) -> None:
    chat = [{"role": "user", "content": "a"}, *messages]
    with pytest.raises(Exception, match=error):
        tokenizers[1].apply_chat_template(chat)


def test_chat_template_has_no_place_for_tools(tokenizers: tuple[Tokenizer, Any]) -> None:
    chat = [{"role": "user", "content": "a"}]
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    with pytest.raises(Exception, match="no place for descriptions of tools"):
        tokenizers[1].apply_chat_template(chat, tools=[{"type": "function", "function": function}])
    assert tokenizers[1].apply_chat_template(chat, tools=[])


def test_a_system_message_without_a_user_message_cannot_be_merged(
    tokenizers: tuple[Tokenizer, Any], monkeypatch: Any
) -> None:
    monkeypatch.setattr(tokenizers[1], "chat_template", hf_tokenizer.chat_template("merge"))
    with pytest.raises(Exception, match="no user message follows"):
        tokenizers[1].apply_chat_template([{"role": "system", "content": "x"}])


# The script


def test_export_of_a_trained_model(encoded: Path, tmp_path: Path) -> None:
    import shutil

    import tiny_runs

    from nanochat import runtime
    from nanochat.eval.record import record
    from nanochat.eval.results import task_result
    from scripts import export_hf

    folder = tmp_path / "artifacts"
    shutil.copytree(encoded, folder)
    config = tiny_runs.base_config(tiny_runs.corpus(encoded), duration={"num_steps": 2})
    tiny_runs.train("base", folder, config)
    with tiny_runs.base_dir(folder):
        meta = {"stage": "base", "tag": "default", "step": 2}
        settings = {"split": "test", "problems": 4, "of": 9}
        record(meta, "task", "some_task", settings, task_result(3, 4, 0.25))
        corpus = {"corpus": "books", "split": "val"}
        record(meta, "bpb", "val", corpus, {"bpb": 2.5, "tokens": 1000})
        record(meta, "core", "CORE", {"max_per_task": None}, {"core": 0.1, "ci": [0.05, 0.15]})
        quick = {"core": 0.9, "ci": [0.8, 1.0]}
        record(meta, "core", "CORE", {"max_per_task": 5}, quick)
        written = export_hf.main(
            export_hf.Config(source="base", texts=50), runtime.single(device="cpu")
        )
    assert written == folder / "export" / "base-default"
    assert load(written).config.vocab_size == Tokenizer.load(folder / "tokenizer").vocab_size
    card = (written / "README.md").read_text(encoding="utf-8")
    for part in (
        "`base`",
        "step 2",
        "| bits per byte, books, val, 1,000 tokens | 2.5000 |",
        "| some_task, 4 of 9 problems |",
        "CORE | 0.1000",
        "75.0% of 4",
    ):
        assert part in card
    assert "0.9" not in card, "a quick look beside the whole"
