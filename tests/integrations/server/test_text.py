"""An answer's text as its tokens come is that of all its tokens, cut at the first stop string."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bayeslora.integrations.server.text import Text

CORPUS = ["The red bag holds 3 blue marbles. Größe, naïve, 你好世界, привет, 🎉🎈 and 👩‍👩‍👧!"] * 4


def byte_level():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def sentencepiece():
    pieces = [
        "<unk>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁red",
        "▁bag",
        "s",
        "old",
        "▁ho",
        "ld",
    ]
    core = Tokenizer(
        models.BPE({piece: n for n, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")


def letters(tokenizer, rng):
    """Tokens of whole letters of one to four bytes, and others between them."""
    ids = []
    for _ in range(12):
        text = rng.choice(["é", "你", "🎉", "n", " red"])
        if tokenizer.convert_tokens_to_ids("<0xE4>") is not None and text != " red":
            ids += [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]
        else:
            ids += tokenizer.encode(text, add_special_tokens=False)
        ids += rng.choice([[], [tokenizer.eos_token_id]])
    return ids


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_pieces_are_the_whole(make):
    tokenizer = make()
    for seed in range(60):
        rng = random.Random(seed)
        # one wrong byte spoils its whole run in sentencepiece, so pieces of it would not add up
        valid = seed % 2 or make is sentencepiece
        ids = letters(tokenizer, rng) if valid else [rng.randrange(len(tokenizer)) for _ in range(30)]
        text, pieces = Text(), []
        for token in ids:
            before = len(text.settled)
            text.add(tokenizer, token)
            pieces.append(text.settled[before:])
            if valid:
                assert "\N{REPLACEMENT CHARACTER}" not in text.settled
        text.close(tokenizer)
        assert text.settled == tokenizer.decode(ids, skip_special_tokens=True)


def test_stop_strings_are_found_as_in_the_whole_text(tokenizer):
    names = [tokenizer.decode([k]) for k in range(3, 20)]
    for seed in range(200):
        rng = random.Random(seed)
        ids = [rng.randrange(3, 20) for _ in range(20)]
        whole = tokenizer.decode(ids)
        stops = [rng.choice(names) + rng.choice(["", " "]) + rng.choice(["", *names])[:2] for _ in range(3)]
        stops += [whole[rng.randrange(10) :][: rng.randrange(1, 9)]]
        text, seen = Text(stops), 0
        for seen, token in enumerate(ids, 1):
            stopped = text.add(tokenizer, token)
            so_far = tokenizer.decode(ids[:seen])
            assert stopped == any(stop in so_far for stop in stops)
            assert not any(stop in text.settled for stop in stops)
            if stopped:
                break
        assert text.settled == so_far[: min(so_far.find(stop) for stop in stops if stop in so_far)]


def test_a_token_costs_the_same_at_the_end_of_a_long_answer():
    class Counting:
        most = 0

        def decode(self, ids, **_):
            self.most = max(self.most, len(ids))
            return "".join("�" if i == 1 else "ab" for i in ids)

    tokenizer = Counting()
    text = Text(["ba" * 50 + "x"] * 4)
    for step in range(3000):
        text.add(tokenizer, step % 7 == 0 or 1 if step > 1500 else 2)
    assert tokenizer.most <= 32
