"""CORE on hand-made bundles, with a model whose opinions are known."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import tiny_model, tiny_tokenizer

from benchmarks.common import words
from nanochat.errors import UserError
from nanochat.eval.core import describe_core, evaluate_core, load_bundle
from nanochat.eval.options import GPTScorer, LogitsScorer
from nanochat.export.hf import load_hf
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime, single

V = 257


class Bytes:
    """One token per byte."""

    bos = 256

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]


def bigram_model(likely: dict[str, tuple[str, float]]) -> LogitsScorer:
    """likely[a] = (b, x): after byte a the logit of b is x; all others are 0."""
    table = torch.zeros(V, V)
    for before, (after, logit) in likely.items():
        table[ord(before), ord(after)] = logit
    return LogitsScorer(lambda ids: table[ids], 10_000, V)


def write_bundle(
    folder: Path, tasks: dict[str, dict[str, Any]], baselines: dict[str, float] | None = None
) -> Path:
    """tasks: label -> its entry in core.yaml, with "items" (None: the file is missing)."""
    entries = []
    for label, task in tasks.items():
        entry = {k: v for k, v in task.items() if k != "items"}
        entries.append({"label": label, "dataset_uri": f"some/{label}.jsonl", **entry})
        if task["items"] is not None:
            path = folder / "eval_data" / "some" / f"{label}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(item) + "\n" for item in task["items"]))
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": entries}))
    with (folder / "eval_meta_data.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Eval Task", "Task Category", "Random baseline"])
        for label in tasks:
            writer.writerow([label, "a, b", (baselines or {}).get(label, 50)])
    return folder


def choice(query: str, choices: list[str], gold: int) -> dict[str, Any]:
    return {"query": query, "choices": choices, "gold": gold}


# After "=" the most likely is "a", but at 1 %; then comes "bababa" for sure; after "x" comes "c".
LIKELY = {"=": ("a", 1.0), "a": ("b", 10.0), "b": ("a", 10.0), "x": ("c", 10.0)}
CHOICES = [
    choice("q", ["ab", "zz"], 0),  # right
    choice("q", ["zz", "ab"], 1),  # right
    choice("q", ["zz", "ab"], 0),  # wrong
    # The mean counts, not the sum: "abz" has the lower sum than "z" and the higher mean.
    choice("q", ["z", "abz"], 1),  # right
]
SCHEMA = [
    {"context_options": ["one y", "one x"], "continuation": "c.", "gold": 1},  # right
    {"context_options": ["two y", "two x"], "continuation": "c.", "gold": 1},  # right
    {"context_options": ["one y", "one x"], "continuation": "c.", "gold": 0},  # wrong
]
LANGUAGE = [
    {"context": "q ", "continuation": "aba"},  # right: each token is the most likely one
    {"context": "q", "continuation": "abz"},  # wrong at the end
    {"context": "q", "continuation": "zba"},  # wrong at the start
    {"context": "q", "continuation": "a"},  # right
    {"context": "q", "continuation": "ac"},  # wrong
]
TASKS: dict[str, dict[str, Any]] = {
    "choosing": {
        "icl_task_type": "multiple_choice",
        "num_fewshot": [0],
        "continuation_delimiter": "=",
        "items": CHOICES,
    },
    "schema": {
        "icl_task_type": "schema",
        "num_fewshot": [0],
        "continuation_delimiter": "",
        "items": SCHEMA,
    },
    "language": {
        "icl_task_type": "language_modeling",
        "num_fewshot": [0],
        "continuation_delimiter": "=",
        "items": LANGUAGE,
    },
}
BASELINES = {"choosing": 50, "schema": 25, "language": 0}


def test_scores_are_exactly_what_the_model_deserves(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path, TASKS, BASELINES)
    result = evaluate_core(bigram_model(LIKELY), Bytes(), bundle, single())
    accuracies = {label: task["accuracy"] for label, task in result["tasks"].items()}
    assert accuracies == {"choosing": 3 / 4, "schema": 2 / 3, "language": 2 / 5}
    centered = {label: task["centered"] for label, task in result["tasks"].items()}
    assert centered == pytest.approx({"choosing": 1 / 2, "schema": 5 / 9, "language": 2 / 5})
    assert result["core"] == pytest.approx((1 / 2 + 5 / 9 + 2 / 5) / 3)
    assert "core_partial" not in result
    assert result["missing"] == []
    assert result["ci"][0] < result["core"] < result["ci"][1]
    assert "CORE 0.4852" in describe_core(result)


def test_a_missing_file_is_named_and_the_score_is_partial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = {**TASKS, "language": {**TASKS["language"], "items": None}}
    bundle = write_bundle(tmp_path, tasks, BASELINES)
    result = evaluate_core(bigram_model(LIKELY), Bytes(), bundle, single())
    assert "core" not in result
    assert result["core_partial"] == pytest.approx((1 / 2 + 5 / 9) / 2)
    assert result["missing"] == ["language"]
    assert (result["num_tasks"], result["num_tasks_total"]) == (2, 3)
    assert "language" in capsys.readouterr().out
    text = describe_core(result)
    assert "partial" in text
    assert "missing: language" in text


def wrong(i: int) -> str:
    return f"{7 * i % 31}no"


def right(i: int) -> str:
    return f"{5 * i % 29}yes{i}"


def shot_task(kind: str, number: int = 12) -> dict[str, Any]:
    items: list[dict[str, Any]] = []
    for i in range(number):
        if kind == "multiple_choice":
            items.append(choice(f"Q{i}?", [wrong(i), right(i)], 1))
        elif kind == "schema":
            items.append(
                {"context_options": [f"A{i}", f"B{i}"], "continuation": f"c{i}.", "gold": 0}
            )
        else:
            items.append({"context": f" C{i}\n", "continuation": f"d{i}"})
    return {
        "icl_task_type": kind,
        "num_fewshot": [3],
        "continuation_delimiter": "\nAnswer: ",
        "items": items,
    }


def test_examples_come_before_the_item_as_in_the_reference(tmp_path: Path) -> None:
    kinds = ("multiple_choice", "schema", "language_modeling")
    bundle = write_bundle(tmp_path, {kind: shot_task(kind) for kind in kinds})
    tasks, _ = load_bundle(bundle)
    index = 4
    order = list(range(12))
    random.Random(1337).shuffle(order)
    others = [i for i in range(12) if i != index]
    shots = [order[i] for i in random.Random(1234 + index).sample(others, 3)]
    item = order[index]
    assert item not in shots
    texts = {task.kind: task.texts(index) for task in tasks}
    head = "".join(f"Q{i}?\nAnswer: {right(i)}\n\n" for i in shots)
    assert texts["multiple_choice"] == [
        f"{head}Q{item}?\nAnswer: {wrong(item)}",
        f"{head}Q{item}?\nAnswer: {right(item)}",
    ]
    head = "".join(f"A{i}\nAnswer: c{i}.\n\n" for i in shots)
    assert texts["schema"] == [
        f"{head}A{item}\nAnswer: c{item}.",
        f"{head}B{item}\nAnswer: c{item}.",
    ]
    head = "".join(f"C{i}\nAnswer: d{i}\n\n" for i in shots)
    assert texts["language_modeling"] == [
        f"{head}C{item}\nAnswer:",
        f"{head}C{item}\nAnswer: d{item}",
    ]


def test_a_quick_look_sees_items_of_the_full_evaluation(tmp_path: Path) -> None:
    """The same shuffle and the same examples: the first items of the full run."""
    seen: list[list[int]] = []

    def forward(ids: torch.Tensor) -> torch.Tensor:
        seen.extend(ids.tolist())
        return torch.zeros(*ids.shape, V)

    bundle = write_bundle(tmp_path, {"t": shot_task("schema", 40)})
    scorer = LogitsScorer(forward, 1000, V)
    evaluate_core(scorer, Bytes(), bundle, single())
    full = {bytes(i for i in row if 0 < i < 256) for row in seen}
    seen.clear()
    result = evaluate_core(scorer, Bytes(), bundle, single(), max_per_task=6)
    quick = {bytes(i for i in row if 0 < i < 256) for row in seen}
    assert result["tasks"]["t"]["total"] == 6
    assert len(quick) == 12
    assert quick < full
    assert "at most 6 items" in describe_core(result)


def tiny_gpt(context_length: int = 200) -> GPT:
    config = GPTConfig(
        vocab_size=V, n_layer=2, n_head=2, n_kv_head=1, n_embd=16, head_dim=8,
        context_length=context_length, windows=(30, 0),
    )  # fmt: skip
    model = GPT(config).init_weights(0, words(config.vocab_size))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def all_kinds(tmp_path: Path) -> Path:
    kinds = ("multiple_choice", "schema", "language_modeling")
    return write_bundle(tmp_path, {kind: shot_task(kind, 50) for kind in kinds})


def test_gpt_scores_like_the_same_model_without_sharing(tmp_path: Path) -> None:
    bundle, model = all_kinds(tmp_path), tiny_gpt()
    ours = evaluate_core(model, Bytes(), bundle, single())
    plain = evaluate_core(LogitsScorer(model, 200, V), Bytes(), bundle, single())
    assert ours["tasks"] == plain["tasks"]
    assert 0 < ours["tasks"]["multiple_choice"]["correct"] < 50


def test_prompts_beyond_the_context_are_cut_and_counted(tmp_path: Path) -> None:
    bundle = all_kinds(tmp_path)
    result = evaluate_core(tiny_gpt(40), Bytes(), bundle, single(), max_per_task=20)
    assert {task["cropped"] for task in result["tasks"].values()} == {20}
    assert "20 cropped" in describe_core(result)
    assert {
        task["cropped"]
        for task in evaluate_core(tiny_gpt(), Bytes(), bundle, single(), 20)["tasks"].values()
    } == {0}


def test_ranks_share_the_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each item goes to one rank, and the sums over ranks are the one-process result."""
    bundle = all_kinds(tmp_path)
    model = tiny_gpt()
    whole = evaluate_core(model, Bytes(), bundle, single())
    parts: list[torch.Tensor] = []

    def keep(self: Runtime, tensor: torch.Tensor) -> torch.Tensor:
        parts.append(tensor.clone())
        return tensor

    monkeypatch.setattr(Runtime, "all_reduce_sum", keep)
    for rank in range(3):
        runtime = Runtime(torch.device("cpu"), torch.float32, rank=rank, world_size=3)
        evaluate_core(model, Bytes(), bundle, runtime)
    totals = torch.stack(parts).sum(0)
    assert all(part[:, 0].sum() < totals[:, 0].sum() for part in parts)
    assert totals[:, 0].tolist() == [task["correct"] for task in whole["tasks"].values()]


def test_bad_bundles_are_explained(tmp_path: Path) -> None:
    runtime, model = single(), bigram_model(LIKELY)

    def fails(bundle: Path, match: str, max_per_task: int | None = None) -> None:
        with pytest.raises(UserError, match=match):
            evaluate_core(model, Bytes(), bundle, runtime, max_per_task)

    fails(tmp_path, "core.yaml is missing")
    bundle = write_bundle(tmp_path, TASKS)
    fails(bundle, "--max-per-task 0", 0)
    file = bundle / "eval_data/some/schema.jsonl"
    good = file.read_text()
    file.write_text(good + '{"context_options": [\n')
    fails(bundle, r"schema.jsonl line 4: not valid JSON")
    file.write_bytes(good.encode() + b'{"context_options": ["caf\xe9\n')
    fails(bundle, r"schema.jsonl line 4: byte 0xe9 at offset 25 is not UTF-8")
    file.write_text(good + '{"context_options": ["a", "b"], "gold": 1}\n')
    fails(bundle, r"schema.jsonl line 4: 'continuation' must be a str")
    file.write_text(good + '{"context_options": ["a"], "continuation": "b", "gold": 1}\n')
    fails(bundle, r"line 4: gold 1 is none of its 1")
    for alternatives in ('["a", 3]', '["a", null]', '["a", NaN]'):
        item = f'{{"context_options": {alternatives}, "continuation": "b", "gold": 0}}'
        file.write_text(f"{good}{item}\n")
        fails(bundle, r"schema.jsonl line 4: every alternative must be a str")
    file.write_text(good + '{"context_options": [], "continuation": "b", "gold": 0}\n')
    fails(bundle, r"line 4: gold 0 is none of its 0")
    file.write_text("\n")
    fails(bundle, "schema.jsonl has no items")
    write_bundle(tmp_path, {"t": {**shot_task("schema", 3)}})
    fails(bundle, "too few for 3 examples")
    write_bundle(tmp_path, {"gone": {**TASKS["schema"], "items": None}})
    fails(bundle, "none of the 1 files")
    write_bundle(tmp_path, {"odd": {**TASKS["schema"], "icl_task_type": "essay"}})
    fails(bundle, "'essay'")
    write_bundle(tmp_path, TASKS)
    (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nschema,50\n")
    fails(bundle, "no random baseline for choosing")
    for number in ("many", "", "nan", "100", "-1"):
        rows = "".join(f"{label},{number}\n" for label in TASKS)
        (bundle / "eval_meta_data.csv").write_text(f"Eval Task,Random baseline\n{rows}")
        fails(bundle, f"random baseline '{number}' of .* must be a percentage from 0")


def test_a_transformers_model_is_scored_with_the_same_code(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    letters = {chr(i): i for i in range(32, 127)} | {"\n": 0, "<end>": 127}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token=" "))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    tokenizer.save_pretrained(tmp_path / "hf")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=128, n_positions=128, n_embd=16, n_layer=1, n_head=2,
        initializer_range=0.5, bos_token_id=None, eos_token_id=127,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "hf")
    folder = tmp_path / "bundle"
    folder.mkdir()
    bundle = all_kinds(folder)

    scorer, encoder = load_hf(str(tmp_path / "hf"), single())
    assert scorer.context_length == 128
    assert encoder.bos == 127
    assert encoder.encode_batch(["ab\n", "c"]) == [[97, 98, 0], [99]]
    prompt, option = [127, 70, 71], [72, 73]
    row = torch.tensor([prompt + option])
    logprobs = model(row).logits[0].log_softmax(-1)
    expected = (logprobs[2, 72] + logprobs[3, 73]).item()
    ((scored,),) = scorer.score([prompt], [[option]])
    assert scored.logprob == pytest.approx(expected, abs=1e-4)
    result = evaluate_core(scorer, encoder, bundle, single(), max_per_task=10)
    assert result["num_tasks"] == 3
    with pytest.raises(UserError, match="--hf"):
        load_hf(str(tmp_path / "nothing"), single())


def test_our_own_export_needs_no_trust_and_code_of_others_does(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from nanochat.export import hf

    tokenizer, model = tiny_tokenizer(), tiny_model()
    hf.export(model, tokenizer, tmp_path / "ours")
    scorer, encoder = load_hf(str(tmp_path / "ours"), single())
    assert encoder.bos == tokenizer.bos
    texts = ["the king", " and more"]
    assert encoder.encode_batch(texts) == tokenizer.encode_batch(texts)
    prompts, options = [[tokenizer.bos, 70, 71]], [[[72, 73], [74]]]
    theirs, ours = scorer.score(prompts, options), GPTScorer(model).score(prompts, options)
    for mine, other in zip(ours[0], theirs[0], strict=True):
        assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)

    settings = tmp_path / "ours" / "config.json"
    settings.write_text(settings.read_text().replace("nanochat_full", "somebody_elses"))
    with pytest.raises(UserError, match="run that, if you trust it, with --trust-remote-code"):
        load_hf(str(tmp_path / "ours"), single())
