"""Tokenizers in GGUF files: what is written, what is refused, and that llama.cpp cuts texts as the tokenizer does."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.bases import BaseModel, load_base
from adapters.errors import BaseInvalid
from adapters.gguf_plan import plan_base_gguf, plan_gguf
from adapters.gguf_vocabulary import CONTROL, NORMAL, SPLITTING, UNUSED, USER_DEFINED, Vocabulary, read_vocabulary
from adapters.gguf_write import write_gguf
from adapters.llamacpp import missing, run
from adapters.merge_plan import plan_merge
from adapters.parity_gguf import HARD_TEXTS
from adapters.parity_served import PROBES
from tests.fixtures.adapters import write_adapter
from tests.fixtures.bases import tiny_qwen2, tiny_qwen3

TEXTS = (
    *PROBES,
    *HARD_TEXTS,
    "",
    "\n",
    "  x",
    "x  ",
    "a  b   c    d",
    "12 123 1234 12345",
    "I'm 'm 'S",
    "ｆｕｌｌ　ｗｉｄｔｈ",
)
needs_llama = pytest.mark.skipif(missing() is not None, reason=missing() or "")


@pytest.fixture
def folder(base: BaseModel, tmp_path: Path) -> Path:
    """A base of its own whose tokenizer may be changed."""
    return Path(shutil.copytree(base.folder, tmp_path / "copy"))


def change(folder: Path, name: str, apply: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / name
    content = json.loads(path.read_text()) if path.is_file() else {}
    apply(content)
    path.write_text(json.dumps(content))


def vocabulary_of(folder: Path) -> Vocabulary:
    return read_vocabulary(folder, json.loads((folder / "config.json").read_text()))


def refused(folder: Path) -> dict[str, str]:
    with pytest.raises(BaseInvalid) as raised:
        vocabulary_of(folder)
    return {problem.path.removeprefix("tokenizer.json:"): problem.message for problem in raised.value.problems}


def test_tokens_have_their_kinds_and_rows_without_one_are_unused(folder: Path) -> None:
    found = vocabulary_of(folder)
    assert len(found.tokens) == len(found.types) == 320 and found.pre == "qwen2"
    kinds = dict(zip(found.tokens, found.types, strict=True))
    assert kinds["a"] == NORMAL and kinds["<|im_end|>"] == CONTROL and kinds["<tool_call>"] == USER_DEFINED
    assert found.tokens[278:280] == ("[PAD278]", "[PAD279]") and set(found.types[278:]) == {UNUSED}
    ids = {token: number for number, token in enumerate(found.tokens)}
    assert found.special == {"eos": ids["<|im_end|>"], "pad": ids["<|endoftext|>"]}
    assert not found.adds_bos and not found.adds_eos


def test_an_ordinary_token_that_only_config_json_names_stays_one(folder: Path) -> None:
    number = vocabulary_of(folder).tokens.index("a")
    change(folder, "tokenizer_config.json", lambda content: content.pop("pad_token"))
    change(folder, "config.json", lambda content: content.update(pad_token_id=number))
    found = vocabulary_of(folder)
    assert found.special["pad"] == number and found.types[number] == NORMAL
    change(folder, "tokenizer_config.json", lambda content: content.update(pad_token={"content": "a"}))
    assert vocabulary_of(folder).types[number] == CONTROL


def test_merges_are_read_in_both_spellings(tmp_path: Path) -> None:
    folder = tiny_qwen2(tmp_path / "real", tokenizer="real")
    first = vocabulary_of(folder)
    assert len(first.merges) == 151_387 and first.merges[0] == "Ġ Ġ"

    def respell(content: dict[str, Any]) -> None:
        merges = content["model"]["merges"]
        is_list = isinstance(merges[0], list)
        content["model"]["merges"] = [" ".join(pair) if is_list else pair.split(" ") for pair in merges]

    change(folder, "tokenizer.json", respell)
    assert vocabulary_of(folder) == first


def test_an_unknown_pre_tokenizer_is_refused_with_what_was_found(folder: Path) -> None:
    for pattern, shown in ((r"\p{N}{1,2}|\p{L}+", r"\\p{N}{1,2}"), (" ", '" "')):
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        change(folder, "tokenizer.json", lambda content, split=split: content.update(pre_tokenizer=split))
        assert shown in refused(folder)["pre_tokenizer"]
    change(folder, "tokenizer.json", lambda content: content.update(pre_tokenizer=None))
    assert "null" in refused(folder)["pre_tokenizer"]


def test_a_known_regex_in_another_manner_of_splitting_is_not_taken_for_it(folder: Path) -> None:
    original = (folder / "tokenizer.json").read_text()
    for changed in ({"behavior": "Removed"}, {"invert": True}):
        (folder / "tokenizer.json").write_text(original)
        change(folder, "tokenizer.json", lambda it, c=changed: it["pre_tokenizer"]["pretokenizers"][0].update(c))
        assert set(refused(folder)) == {"pre_tokenizer"}
    (folder / "tokenizer.json").write_text(original)
    change(folder, "tokenizer.json", lambda it: it["model"].update(ignore_merges=True))
    assert "ignore_merges True" in refused(folder)["pre_tokenizer"]


def test_all_that_llama_cpp_would_do_otherwise_is_refused_at_once(folder: Path) -> None:
    def spoil(content: dict[str, Any]) -> None:
        content["normalizer"] = {"type": "Lowercase"}
        content["model"]["byte_fallback"] = True
        content["added_tokens"][0]["lstrip"] = True
        content["model"]["vocab"]["far"] = 999
        template = {
            "type": "TemplateProcessing",
            "special_tokens": {"<x>": {"id": "<x>", "ids": [7], "tokens": ["<x>"]}},
        }
        template["single"] = [{"SpecialToken": {"id": "<x>"}}, {"Sequence": {"id": "A"}}]
        content["post_processor"] = template

    change(folder, "tokenizer.json", spoil)
    change(folder, "tokenizer_config.json", lambda content: content.update(bos_token="<none>"))
    problems = refused(folder)
    assert {"normalizer", "model.byte_fallback", "added_tokens", "model.vocab", "post_processor"} == set(problems)
    assert "'far' has the id 999; the embedding has 320 rows" in problems["model.vocab"]
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BaseInvalid, match=r"has no tokenizer\.json"):
        vocabulary_of(folder)


def test_further_ends_of_an_answer_go_into_the_file_and_what_is_one_too_many_is_noted(folder: Path) -> None:
    ids = {token: number for number, token in enumerate(vocabulary_of(folder).tokens)}
    ends = [ids[token] for token in ("<|im_end|>", "<|endoftext|>", "a", "b", "c")]
    change(folder, "generation_config.json", lambda content: content.update(eos_token_id=ends))
    found = vocabulary_of(folder)
    assert (found.special["eot"], found.special["eom"]) == (ids["a"], ids["b"])
    assert any(str([ids["c"]]) in note for note in found.notes)


@needs_llama
def test_answers_end_in_llama_cpp_where_the_base_s_end_with_another_tokenizer_too(folder: Path, tmp_path: Path) -> None:
    ids = {token: number for number, token in enumerate(vocabulary_of(folder).tokens)}
    ends = [ids[token] for token in ("<|im_end|>", "<|endoftext|>", "a", "b")]
    change(folder, "generation_config.json", lambda content: content.update(eos_token_id=ends))
    own = tmp_path / "own"  # as a trainer leaves it beside an adapter
    own.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / name, own / name)
    base = load_base(folder)
    merged = plan_merge(write_adapter(tmp_path / "adapter", base), base)
    write_gguf(plan_gguf(merged, quantisation="f32", name="x", tokenizer=own), tmp_path / "f.gguf")
    asked = [*ends, ids["c"]]
    assert list(run(tmp_path / "f.gguf", prompts=[[1, 2]], new_tokens=1, stops=asked).ends) == ends


def cut_by_llama(folder: Path, path: Path, texts: tuple[str, ...] = TEXTS) -> list[list[int]]:
    write_gguf(plan_base_gguf(load_base(folder), quantisation="q8_0", name="x"), path)
    return [list(ids) for ids in run(path, texts=texts).texts]


@needs_llama
@pytest.mark.parametrize("make", [tiny_qwen2, tiny_qwen3])
def test_llama_cpp_cuts_as_the_real_tokenizers_of_qwen_do(make: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = make(tmp_path / "base", tokenizer="real")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert cut_by_llama(folder, tmp_path / "f.gguf") == [tokenizer(text)["input_ids"] for text in TEXTS]


@needs_llama
@pytest.mark.model
def test_llama_cpp_cuts_as_the_embedded_base_s_tokenizer_does(embedded_base: BaseModel, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_base.folder)
    assert cut_by_llama(embedded_base.folder, tmp_path / "f.gguf") == [tokenizer(text)["input_ids"] for text in TEXTS]


@needs_llama
def test_llama_cpp_does_not_compose_characters_as_the_note_says(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tiny_qwen2(tmp_path / "base", tokenizer="real")
    assert any("NFC" in note for note in vocabulary_of(folder).notes)
    decomposed = unicodedata.normalize("NFD", "người dùng")
    (ids,) = cut_by_llama(folder, tmp_path / "f.gguf", (decomposed,))
    assert ids != AutoTokenizer.from_pretrained(folder)(decomposed)["input_ids"]


def steps_of(steps: tuple[str, ...]) -> Any:
    """The pre_tokenizer of one entry of SPLITTING."""
    from tokenizers import Regex, pre_tokenizers

    made = {
        "bytes": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        "bytes in words": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        "each digit": lambda: pre_tokenizers.Digits(individual_digits=True),
    }
    parts = [made[step]() if step in made else pre_tokenizers.Split(Regex(step), behavior="isolated") for step in steps]
    return pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]


def without_splits(pre_tokenizer: Any, *, takes_whole_words: bool) -> Any:
    """A tokenizer whose merges reach over words, numbers and lines, so that every split shows in the ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False, min_frequency=1)
    learner.train_from_iterator(TEXTS, trainer)
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(model["vocab"], merges, ignore_merges=takes_whole_words))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    bos = ("<|im_start|>", tokenizer.token_to_id("<|im_start|>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[bos])
    return tokenizer


@needs_llama
@pytest.mark.parametrize("entry", SPLITTING, ids=SPLITTING.values())
def test_every_known_splitting_is_llama_cpp_s_of_that_name(entry: tuple[tuple[str, ...], bool], tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    steps, takes_whole_words = entry
    tokenizer = without_splits(steps_of(steps), takes_whole_words=takes_whole_words)
    folder = tiny_qwen2(tmp_path / "base", vocab_size=1280)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    found = vocabulary_of(folder)
    assert found.pre == SPLITTING[entry] and found.adds_bos
    wanted = [tokenizer.encode(text).ids for text in TEXTS]
    assert wanted != [without_splits(None, takes_whole_words=False).encode(text).ids for text in TEXTS]
    assert cut_by_llama(folder, tmp_path / "f.gguf") == wanted
