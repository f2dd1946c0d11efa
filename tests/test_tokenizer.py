"""The tokenizer against the vendor's, and that no text can forge a control id."""

import copy
import json
import pickle
import random
import subprocess
import sys

import pytest
from fixtures import ENCODED, HOSTILE, SHARED, SMALL_VOCABULARY, VOCABULARIES, rows
from transformers import AutoTokenizer

from baichuan_sft.model.tokenization_baichuan import BaiChuanTokenizer, BaichuanTokenizer

VENDOR_CONFIGS = {"baichuan1": "Baichuan-13B-Chat", "baichuan2": "Baichuan2-13B-Chat"}


def test_encode_and_decode_equal_the_vendor(vocabulary, tokenizer):
    compared = 0
    for row in rows(ENCODED[vocabulary]):
        text, gold = row["text"], row[vocabulary]
        ids = tokenizer.encode(text)
        decoded = gold.get("decoded", text)
        assert ids == gold["ids"]
        assert tokenizer.decode(ids) == decoded
        if not vocabulary.endswith("_like"):  # recorded with the vendor's vocabularies only
            assert tokenizer.decode(ids, skip_special_tokens=True) == gold.get(
                "decoded_skip_special", decoded
            )
        assert tokenizer.convert_tokens_to_string(tokenizer.tokenize(text)) == decoded
        compared += 1
    assert compared == 287


def test_decode_of_random_ids_equals_the_vendor(vocabulary, tokenizer):
    if vocabulary.endswith("_like"):
        pytest.skip("recorded with the vendor's vocabularies only")
    golds = [row[vocabulary] for row in rows("tokenizer/decode.jsonl")]
    for gold in golds:
        decoded = gold["decoded"]
        assert tokenizer.decode(gold["ids"]) == decoded
        assert tokenizer.decode(gold["ids"], skip_special_tokens=True) == gold.get(
            "decoded_skip_special", decoded
        )
    assert len(golds) == 100


def test_safe_encoding_keeps_the_ids_of_ordinary_text(vocabulary, tokenizer):
    golds = [(row["text"], row[vocabulary]["ids"]) for row in rows(ENCODED[vocabulary])]
    ordinary = [(text, ids) for text, ids in golds if not tokenizer.control_ids & set(ids)]
    assert tokenizer.encode_texts([text for text, _ in ordinary]) == [ids for _, ids in ordinary]
    for text, ids in ordinary:
        assert tokenizer(text, split_special_tokens=True)["input_ids"] == ids
    assert len(ordinary) > 250


def test_no_literal_becomes_a_control_id_the_safe_way(tokenizer):
    literals = [tokenizer.convert_ids_to_tokens(i) for i in sorted(tokenizer.control_ids)]
    texts = [*literals, HOSTILE, "".join(literals), *(f"a{literal} b" for literal in literals)]
    for text, ids in zip(texts, tokenizer.encode_texts(texts)):
        assert not tokenizer.control_ids & set(ids), text
    assert tokenizer.encode(HOSTILE, split_special_tokens=True) == tokenizer.encode_text(HOSTILE)
    assert {0, 1, 2, 195} <= set(tokenizer.encode(HOSTILE)) or {0, 1, 2, 199} <= set(
        tokenizer.encode(HOSTILE)
    )
    assert len(literals) == len(tokenizer.control_ids) > 300


def fuzzed(count, seed):
    """Texts of 1 to 8 fragments of control literals, near misses and ordinary characters."""
    rng = random.Random(seed)
    parts = [
        "<reserved_",
        "106",
        "107",
        "102>",
        ">",
        "<",
        "</s>",
        "<s>",
        "<unk>",
        "</",
        "s>",
        "<reserved_106>",
    ]
    parts += [
        "<reserved_107>",
        "＜reserved_106＞",
        "<0x0A>",
        "\n",
        " ",
        "  ",
        "\t",
        "你好",
        "a",
        "é",
        "😀",
        "\0",
        "１",
    ]
    return ["".join(rng.choices(parts, k=rng.randint(1, 8))) for _ in range(count)]


def test_no_fuzzed_text_gives_a_control_id(small):
    texts = fuzzed(100_000, seed=0)
    ids = small.encode_texts(texts)
    assert not small.control_ids & {i for row in ids for i in row}
    assert small.sp_model.decode(ids) == texts
    forged = sum(bool(small.control_ids & set(row)) for row in small.sp_model.encode(texts))
    assert forged > 10_000  # the default way; else the texts would prove nothing


def test_normalising_vocabulary_gives_no_control_id_either():
    tokenizer = BaichuanTokenizer(VOCABULARIES["baichuan1_like"])
    ids = tokenizer.encode_texts(fuzzed(20_000, seed=1))
    assert not tokenizer.control_ids & {i for row in ids for i in row}


def test_role_ids(tokenizer, vocabulary):
    assert (tokenizer.user_token_id, tokenizer.assistant_token_id) == (195, 196)
    names = (
        ["<reserved_102>", "<reserved_103>"] if "1" in vocabulary else ["<reserved_106>", "<reserved_107>"]
    )
    assert tokenizer.convert_ids_to_tokens([195, 196]) == names
    assert {0, 1, 2, 195, 196} <= tokenizer.control_ids


def test_a_lone_surrogate_is_refused(small):
    for encode in (small.encode_text, small.encode, small.tokenize):
        with pytest.raises(ValueError, match=r"lone surrogate U\+D800 at character 2"):
            encode("ab\ud800c")
    with pytest.raises(TypeError, match="expected a text, got NoneType"):
        small.encode_texts(["a", None])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
        (b"junk", "not a SentencePiece model"),
    ],
)
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path, content, message):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        BaichuanTokenizer(path)


def same(one, other, text=f"你好 {HOSTILE} Hello"):
    assert one.encode(text) == other.encode(text)
    assert one.encode_text(text) == other.encode_text(text)
    assert one.chat_template == other.chat_template
    assert one.get_vocab() == other.get_vocab()
    assert (one.pad_token_id, one.bos_token_id, one.eos_token_id, one.unk_token_id) == (0, 1, 2, 0)
    return True


def test_save_load_pickle_and_deepcopy(tokenizer, vocabulary, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == VOCABULARIES[vocabulary].read_bytes()
    assert (tmp_path / "chat_template.jinja").exists()
    assert same(BaichuanTokenizer.from_pretrained(tmp_path), tokenizer)
    assert same(pickle.loads(pickle.dumps(tokenizer)), tokenizer)
    assert same(copy.deepcopy(tokenizer), tokenizer)


def test_added_tokens_and_bos_survive_a_save(tmp_path):
    tokenizer = BaichuanTokenizer(SMALL_VOCABULARY, add_bos_token=True, add_eos_token=True)
    assert tokenizer.add_tokens(["<tool>"]) == 1
    tokenizer.save_pretrained(tmp_path)
    again = BaichuanTokenizer.from_pretrained(tmp_path)
    for one in (tokenizer, again):
        assert one.encode("a<tool>b") == [1, *one.encode_text("a"), 6144, *one.encode_text("b"), 2]
        assert 6144 not in one.encode("a<tool>b", split_special_tokens=True)
        assert len(one) == 6145


@pytest.fixture
def vendor_directory(tokenizer, vocabulary, tmp_path):
    """A directory as the vendor ships it: tokenizer.model and its old tokenizer_config.json."""
    if vocabulary not in VENDOR_CONFIGS:
        pytest.skip("the vendor's configuration goes with the vendor's vocabulary")
    for file in (SHARED / "reference" / "vendor-configs" / VENDOR_CONFIGS[vocabulary]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer.save_vocabulary(str(tmp_path))
    return tmp_path


def test_vendor_directory_loads_unchanged(vendor_directory, tokenizer):
    loaded = BaichuanTokenizer.from_pretrained(vendor_directory)
    assert same(loaded, tokenizer)
    assert loaded.model_max_length == 4096
    auto = AutoTokenizer.from_pretrained(vendor_directory)  # registered by the package
    assert type(auto) is BaichuanTokenizer
    assert same(auto, tokenizer)


def test_baichuan_7b_class_name_loads_through_auto(vendor_directory, tokenizer):
    path = vendor_directory / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "BaiChuanTokenizer"}
    path.write_text(json.dumps(config))
    auto = AutoTokenizer.from_pretrained(vendor_directory)
    assert type(auto) is BaiChuanTokenizer
    assert same(auto, tokenizer)


@pytest.mark.slow
def test_saved_directory_loads_without_the_package(tmp_path):
    tokenizer = BaichuanTokenizer(SMALL_VOCABULARY)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenization_baichuan.py").exists()
    messages = [{"role": "user", "content": HOSTILE}]
    code = f"""
import sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "saved")!r}, trust_remote_code=True)
assert type(tokenizer).__module__.startswith("transformers_modules"), type(tokenizer)
assert tokenizer.encode({HOSTILE!r}) == {tokenizer.encode(HOSTILE)}
assert tokenizer.apply_chat_template({messages!r})["input_ids"] == {[195, *tokenizer.encode_text(HOSTILE)]}
assert "baichuan_sft" not in sys.modules
"""
    # -I: neither the working directory nor PYTHONPATH, so only an installed package could be imported.
    subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=tmp_path)
