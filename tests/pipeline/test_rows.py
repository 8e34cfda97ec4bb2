"""Calibration rows and windows: where they begin, what they are cut from, and what is too little for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call, line
from torch.nn.functional import cross_entropy
from toys import toy_checkpoint, toy_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from vqcompress.evaluate.perplexity import windows
from vqcompress.methods import make
from vqcompress.methods.smoothing import Smoothing, fit_smoothing
from vqcompress.methods.statistics import Statistics
from vqcompress.model.stream import BlockStream
from vqcompress.model.tokenizer import cut_rows, load_tokenizer, pack, read_text, start_tokens, tokenize
from vqcompress.pipeline.options import QuantizeOptions
from vqcompress.pipeline.plan import silent
from vqcompress.pipeline.rows import calibration_rows
from vqcompress.storage.checkpoint import Checkpoint

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
CPU = torch.device("cpu")


def with_bos(source: Path, to: Path, adds: bool = True, template: str | None = None) -> Path:
    """A copy of a toy whose tokenizer adds <s> before a text, or has a chat template."""
    from tokenizers.processors import TemplateProcessing

    shutil.copytree(source, to)
    tokenizer = AutoTokenizer.from_pretrained(to)
    if adds:
        begin = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
        tokenizer.backend_tokenizer.post_processor = begin
    tokenizer.chat_template = template
    tokenizer.save_pretrained(to)
    return to


@pytest.fixture(scope="module")
def starts(toy: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_bos(Path(toy()), tmp_path_factory.mktemp("bos") / "toy", template=TEMPLATE)


def rows_of(model: Path, *texts: str | Path, **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    stream = BlockStream(Checkpoint(model), CPU, torch.float32)
    job = QuantizeOptions(str(model), texts=[str(text) for text in texts], **{"samples": 8, "seqlen": 16, **options})
    return calibration_rows(stream, job, silent)


def test_a_template_that_writes_the_bos_token_adds_no_second_one(toy: Any, tmp_path: Path) -> None:
    model = with_bos(Path(toy()), tmp_path / "toy", False, "{{ bos_token }}" + TEMPLATE)
    chats = tmp_path / "chats.jsonl"
    words = ("river", "stone", "light") * 90
    chats.write_text("".join(json.dumps({"messages": [{"role": "user", "content": w}]}) + "\n" for w in words))
    tokenizer = load_tokenizer(model)
    assert not (tokenize(tokenizer, read_text(tokenizer, str(chats))) == 1).any()
    rows, _ = rows_of(model, chats)
    assert torch.equal(rows == 1, (torch.arange(16) == 0).expand(len(rows), -1))


def test_a_marker_of_turns_that_is_called_bos_stays(toy: Any, tmp_path: Path) -> None:
    """As in SmolLM2: the tokenizer puts nothing before a text, and each turn begins with its BOS token."""
    model = with_bos(Path(toy()), tmp_path / "toy", False, TEMPLATE)
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = "{% for m in messages %}" + tokenizer.bos_token + "{{ m.content }}{% endfor %}"
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "river"}]}) + "\n")
    assert start_tokens(tokenizer, "auto") == []
    assert read_text(tokenizer, str(chats)) == f"{tokenizer.bos_token}river"


def test_where_rows_begin_is_what_the_tokenizer_does(toy: Any, starts: Path, tmp_path: Path) -> None:
    plain = AutoTokenizer.from_pretrained(toy())
    begins = AutoTokenizer.from_pretrained(starts)
    assert [start_tokens(plain, bos) for bos in ("auto", "always", "never")] == [[], [1], []]
    assert [start_tokens(begins, bos) for bos in ("auto", "always", "never")] == [[1], [1], []]
    # Trained on chats that begin so, whatever the tokenizer adds.
    plain.chat_template = "{{ bos_token }}" + TEMPLATE
    assert start_tokens(plain, "auto") == [1]


def test_a_perplexity_with_bos_is_that_of_a_plain_loop(starts: Path, text: Path) -> None:
    words = ["eval", "perplexity", starts, "--text", text, "--seqlen", "32", "--windows", "5", "--json", "-"]
    facts = json.loads(call(*words).stdout)
    ids = AutoTokenizer.from_pretrained(starts)(text.read_text(), add_special_tokens=False)["input_ids"]
    rows = torch.tensor(ids)[: 5 * 31].view(5, 31)
    rows = torch.cat([torch.ones(5, 1, dtype=torch.int64), rows], 1)
    logits = AutoModelForCausalLM.from_pretrained(starts).eval()(rows).logits[:, :-1]
    expected = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()
    assert facts["nll_per_token"] == pytest.approx(expected, rel=1e-5)
    assert (facts["bos"], facts["stride"], facts["tokens"]) == (True, 31, 5 * 31)
    never = json.loads(call(*words, "--bos", "never").stdout)
    assert (never["bos"], never["stride"], never["tokens"]) == (False, 32, 5 * 31)
    assert never["nll_per_token"] != facts["nll_per_token"]


def test_overlapping_windows_with_bos_score_every_token_once() -> None:
    cut = windows(torch.arange(10, 31), 8, 3, None, [1])
    assert cut[:, 0].tolist() == [1] * 5
    assert cut[:2, 1:].tolist() == [list(range(10, 17)), list(range(13, 20))]


def test_rows_of_plain_text_are_the_bytes_they_were(toy: Any, starts: Path, text: Path) -> None:
    found, facts = rows_of(toy(), text)
    ids = tokenize(load_tokenizer(toy()), text.read_text())
    assert torch.equal(found, cut_rows(ids, 8, 16, 0, "text"))
    assert (facts["texts"], facts["bos"]) == (["text.txt"], False)
    found, facts = rows_of(starts, text)
    assert torch.equal(found[:, 1:], cut_rows(ids, 8, 15, 0, "text"))
    assert (found[:, 0].tolist(), facts["bos"]) == ([1] * 8, True)


def test_documents_are_packed_and_chats_are_rendered(starts: Path, toy: Any, tmp_path: Path) -> None:
    rows = [{"text": "river"}, {"text": "stone"}, {"messages": [{"role": "user", "content": "light"}]}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = load_tokenizer(starts)
    assert tokenizer.decode(pack(tokenizer, [str(tmp_path / "x.jsonl")])) == "river</s>stone</s>user: light\n"
    for job in (
        ["quantize", toy(), "--recipe", "vq-2bit", "-o", tmp_path / "o", "--calibration"],
        ["eval", "perplexity", toy(), "--text"],
    ):
        found = call(*job, tmp_path / "x.jsonl")
        assert (found.exit_code, "x.jsonl, line 3" in line(found)) == (1, True)


def test_a_chat_that_its_template_refuses_is_left_out(starts: Path, tmp_path: Path) -> None:
    odd = with_bos(
        starts, tmp_path / "odd", template="{% if messages|length > 1 %}{{ raise_exception('odd') }}{% endif %}a"
    )
    talk = [{"role": "user", "content": "light"}]
    (tmp_path / "x.jsonl").write_text(f"{json.dumps({'messages': talk * 2})}\n{json.dumps({'messages': talk})}\n")
    with pytest.warns(UserWarning, match=r"x.jsonl, line 1.*odd"):
        assert load_tokenizer(odd).decode(pack(load_tokenizer(odd), [str(tmp_path / "x.jsonl")])) == "a"


def test_a_mixture_gives_each_text_its_share(toy: Any, text: Path, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("garden " * 400)
    found, facts = rows_of(toy(), f"{text}=3", f"{tmp_path / 'b.txt'}=1")
    assert facts["rows"] == [6, 2]
    assert sum(len(row.unique()) < 3 for row in found) == 2
    assert torch.equal(found, rows_of(toy(), f"{text}=3", f"{tmp_path / 'b.txt'}=1")[0])
    for texts in ([f"{text}=1", text], ["self", text]):
        wrong = call(
            "quantize",
            toy(),
            "-o",
            tmp_path / "o",
            "--recipe",
            "vq-2bit",
            "--samples",
            "8",
            *(w for t in texts for w in ("--calibration", t)),
        )
        assert (wrong.exit_code, "--calibration" in line(wrong)) == (2, True)


def test_rows_of_the_model_itself(toy: Any, text: Path, tmp_path: Path) -> None:
    found, facts = rows_of(toy(), "self", samples=3, seqlen=12)
    assert (found.shape, facts["temperature"], facts["texts"]) == ((3, 12), 1.0, ["self"])
    assert torch.equal(found, rows_of(toy(), "self", samples=3, seqlen=12)[0])
    assert not torch.equal(found, rows_of(toy(), "self", samples=3, seqlen=12, seed=1)[0])
    facts = rows_of(toy(), "self=1", f"{text}=3", samples=8)[1]
    assert (facts["texts"], facts["rows"]) == ([text.name, "self"], [6, 2])


def test_rows_of_the_model_itself_are_its_distribution(starts: Path, tmp_path: Path) -> None:
    """The tokens that follow BOS are drawn from the logits there."""
    found, _ = rows_of(starts, "self", samples=400, seqlen=2)
    assert set(found[:, 0].tolist()) == {1}
    model = AutoModelForCausalLM.from_pretrained(starts).eval()
    expected = model(torch.tensor([[1]])).logits[0, -1].softmax(-1)
    drawn = torch.bincount(found[:, 1], minlength=len(expected)) / 400
    assert (drawn - expected).abs().sum() < 2 * (2 * len(expected) / (3.14 * 400)) ** 0.5


def test_a_text_that_says_nothing_is_a_warning(toy: Any, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("river " * 400)
    with pytest.warns(UserWarning, match=r"x.txt.* \d different tokens"):
        facts = rows_of(toy(), tmp_path / "x.txt")[1]
    assert (facts["distinct_tokens"] < 5, facts["few_tokens"]) == (True, True)


def test_factors_of_channels_that_few_tokens_left_quiet_are_bounded() -> None:
    statistics = Statistics(tokens=9, absmax_I=torch.tensor([1e-6, 0.5, 1.0, 1.0, 9.0]))
    job = (Smoothing(alpha=0.5), [torch.ones(2, 5)], [make("int8", {})], statistics, torch.arange(5), False, 0)
    assert fit_smoothing(*job)[0].tolist() == pytest.approx([1e-5**0.5, 0.5**0.5, 1, 1, 3])
    assert fit_smoothing(*job, few_tokens=True)[0].tolist() == pytest.approx([1, 1, 1, 1, 3])


@pytest.mark.parametrize("command", ["quantize", "eval", "compare", "generate"])
def test_a_token_that_the_model_has_no_embedding_for_is_named(command: str, tmp_path: Path, toy: Any) -> None:
    small = toy_checkpoint(tmp_path / "toy", hidden=64, vocab=300)
    for file in Path(toy()).glob("tokenizer*"):
        shutil.copy(file, small)
    (tmp_path / "x.txt").write_text(toy_text(400))
    words = {
        "quantize": [
            "quantize",
            small,
            "-o",
            tmp_path / "o",
            "--recipe",
            "vq-2bit",
            "--seqlen",
            "16",
            "--calibration",
            tmp_path / "x.txt",
        ],
        "eval": ["eval", "perplexity", small, "--seqlen", "16", "--text", tmp_path / "x.txt"],
        "compare": ["compare", small, "--seqlen", "16", "--text", tmp_path / "x.txt"],
        "generate": ["generate", small, "--prompt", toy_text(40)],
    }
    wrong = call(*words[command])
    assert (wrong.exit_code, "300" in line(wrong), str(small) in line(wrong)) == (1, True, True)


def test_a_short_text_is_named_with_its_numbers(toy: Any, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(toy_text(30))
    (tmp_path / "y.txt").write_text("")
    both = ["--calibration", "self=1"]
    for name in ("x.txt", "y.txt"):
        tokens = len(tokenize(load_tokenizer(toy()), (tmp_path / name).read_text()))
        for job in (
            ["quantize", toy(), "-o", tmp_path / "o", "--recipe", "vq-2bit", "--calibration"],
            ["quantize", toy(), "-o", tmp_path / "o", "--recipe", "vq-2bit", *both, "--calibration"],
            ["eval", "perplexity", toy(), "--text"],
        ):  # fmt: skip
            given = f"{tmp_path / name}=1" if "self=1" in job else tmp_path / name
            wrong = call(*job, given)
            found = line(wrong)
            assert (wrong.exit_code, str(tmp_path / name) in found, f"{tokens} tokens" in found) == (1, True, True)
            assert "--seqlen" in found
