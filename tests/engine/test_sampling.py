"""Filters against plain-Python ones, draws against their distribution, text against its bytes."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.engine.detokenizer import PartDecoder, StopFilter, answer_of, parts_of
from nanochat.engine.sampling import Sampling, adjust, draw, sample, top_logprobs, uniform


def reference(
    logits: list[float], temperature: float, top_k: int | None, top_p: float, min_p: float
) -> list[float]:
    """The distribution after temperature, top-k, top-p and min-p, the slow way."""
    weights = {i: math.exp((z - max(logits)) / temperature) for i, z in enumerate(logits)}
    order = sorted(weights, key=lambda i: -weights[i])
    order = order[: top_k or len(order)]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass < top_p or not kept:
            kept.append(i)
        mass += weights[i] / total
    kept = [i for i in kept if weights[i] >= min_p * weights[kept[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-40, 40), min_size=2, max_size=12, unique=True),
    st.sampled_from([0.3, 1.0, 1.7]),
    st.sampled_from([None, 0, 1, 3, 50]),
    st.sampled_from([0.0, 0.35, 0.9, 1.0]),
    st.sampled_from([0.0, 0.1, 1.0]),
)
def test_filters_match_reference(
    steps: list, temperature: float, top_k: int | None, top_p: float, min_p: float
) -> None:
    logits = [step / 8 for step in steps]
    wanted = reference(logits, temperature, top_k, top_p, min_p)
    # A fine comb of uniforms recovers the distribution itself.
    comb = (torch.arange(4000) + 0.5) / 4000
    drawn = draw(torch.tensor(logits).expand(4000, -1), comb, temperature, top_k, top_p, min_p)
    found = torch.bincount(drawn, minlength=len(logits)) / 4000
    assert torch.allclose(found, torch.tensor(wanted), atol=2e-3)


def test_greedy_is_argmax() -> None:
    logits_BV = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    greedy = Sampling(temperature=0.0, top_k=3, top_p=0.1)
    assert sample(logits_BV, [greedy] * 8, range(8)) == logits_BV.argmax(1).tolist()
    nearly = Sampling(temperature=1e-30)
    assert sample(logits_BV, [nearly] * 8, range(8)) == logits_BV.argmax(1).tolist()


def test_seed_independent_of_neighbours() -> None:
    logits_BV = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    mixed = [
        Sampling(seed=5),
        Sampling(0.0),
        Sampling(0.7, top_k=5, seed=5),
        Sampling(seed=6),
        Sampling(1.3, top_p=0.8, seed=5),
        Sampling(seed=5, banned=(1, 2)),
    ]
    together = sample(logits_BV, mixed, [9, 9, 3, 9, 4, 9])
    for row in range(6):
        assert sample(logits_BV[row : row + 1], [mixed[row]], [[9, 9, 3, 9, 4, 9][row]]) == [together[row]]
    assert sample(logits_BV.flip(0), mixed[::-1], [9, 4, 9, 3, 9, 9]) == together[::-1]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-30, 30), min_size=8, max_size=8),
    st.lists(st.integers(0, 7), max_size=6),
    st.lists(st.integers(0, 7), max_size=6),
    st.dictionaries(st.integers(-2, 9), st.sampled_from([-100.0, -1.5, 2.0]), max_size=3),
    st.sampled_from([0.5, 1.0, 1.3]),
    st.sampled_from([-0.5, 0.0, 0.7]),
    st.sampled_from([-0.25, 0.0, 1.1]),
)
def test_penalties_match_reference(
    steps: list, prompt: list, output: list, bias: dict, repeat: float, presence: float, frequency: float
) -> None:
    """logit_bias, then repetition over prompt and output, then presence and frequency over the output."""
    how = Sampling(
        0.0,
        logit_bias=bias,
        repetition_penalty=repeat,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    wanted = []
    for token, step in enumerate(steps):
        z = step / 4 + bias.get(token, 0.0)
        if token in prompt or token in output:
            z = z / repeat if z > 0 else z * repeat
        if token in output:
            z -= presence + frequency * output.count(token)
        wanted.append(z)
    logits_V = torch.tensor(steps) / 4
    found_V = adjust(logits_V, how, (prompt, output), [3, 99])
    wanted[3] = -math.inf
    torch.testing.assert_close(found_V, torch.tensor(wanted), atol=1e-5, rtol=0)
    assert torch.equal(logits_V, torch.tensor(steps) / 4)  # the caller's are left alone
    together = sample(logits_V.expand(2, -1), [Sampling(0.0), how], [9, 9], [((), ()), (prompt, output)])
    assert together[0] == int(logits_V.argmax())
    plain = adjust(logits_V, how, (prompt, output))
    assert plain[together[1]] == plain.max()


def test_bans_of_one_draw() -> None:
    logits_BV = torch.tensor([[3.0, 2.0, 1.0]] * 2)
    assert sample(logits_BV, [Sampling(0.0)] * 2, [0, 0], bans=[(0,), (0, 1)]) == [1, 2]


def test_top_logprobs() -> None:
    logits_NV = torch.randn(5, 30, generator=torch.Generator().manual_seed(2))
    tokens, counts = [3, 0, 29, 7, 7], [0, 1, 5, 30, 99]
    wanted = logits_NV.log_softmax(1)
    for n, (own, likeliest) in enumerate(top_logprobs(logits_NV, tokens, counts)):
        assert own == float(wanted[n, tokens[n]])
        assert len(likeliest) == min(30, counts[n])
        assert likeliest == [
            (i, float(wanted[n, i])) for i in wanted[n].argsort(descending=True)[: counts[n]].tolist()
        ]
    assert top_logprobs(logits_NV[:1], [int(logits_NV[0].argmax())], [1])[0][1][0][1] == float(
        wanted[0].max()
    )


def test_chi_square() -> None:
    probs = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.01])
    for chosen in (
        sample(
            probs.log().expand(20_000, -1), [Sampling(seed=3)] * 20_000, range(20_000)
        ),  # along a sequence
        sample(
            probs.log().expand(20_000, -1), [Sampling(seed=s) for s in range(20_000)], [7] * 20_000
        ),  # over seeds
    ):
        counts = torch.bincount(torch.tensor(chosen), minlength=6)
        expected = probs * 20_000
        assert float(((counts - expected) ** 2 / expected).sum()) < 20.5  # 5 degrees of freedom, p = 0.001


def test_uniform() -> None:
    values = [uniform(seed, position) for seed in range(-3, 40) for position in range(50)]
    assert all(0 <= value < 1 for value in values)
    assert len(set(values)) > len(values) - 5
    assert uniform(2**63, 0) != uniform(0, 0)
    # A neighbouring seed is not the same sequence shifted.
    assert not {uniform(1, p) for p in range(200)} & {uniform(2, p) for p in range(200)}


def test_edges_of_a_draw() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]])
    for value, token in ((0.0, 0), (0.49, 0), (0.51, 2), (1.0, 2)):
        assert draw(logits, torch.tensor([value])).tolist() == [token]
    assert draw(logits, torch.tensor([1.0]), top_k=3).tolist()[0] in (0, 2)
    assert sample(logits, [Sampling(banned=(0,))], [0]) == [2]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"presence_penalty": math.nan},
        {"frequency_penalty": math.inf},
        {"logit_bias": {1: math.inf}},
    ],
)
def test_settings_out_of_range(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)


class Bytes:
    """A tokenizer of one token per byte; specials from 256 on."""

    names = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>", "<|assistant_end|>")

    def get_special_tokens(self) -> set[str]:
        return set(self.names)

    def encode_special(self, name: str) -> int:
        return 256 + self.names.index(name)

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(ids)


def shown(ids: list[int]) -> str:
    decoder = PartDecoder(Bytes())
    pieces = [piece for i in ids for piece in decoder.push(i)] + decoder.flush()
    assert all(text for _, text in pieces)
    return "".join(text for _, text in pieces)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40))
def test_streamed_bytes_equal_the_whole(data: bytes) -> None:
    assert shown(list(data)) == data.decode(errors="replace")


def test_characters_appear_when_they_are_whole() -> None:
    decoder = PartDecoder(Bytes())
    assert [decoder.push(b) for b in "é🙂".encode()] == [[], [("text", "é")], [], [], [], [("text", "🙂")]]


def test_parts() -> None:
    tok = Bytes()
    start, end, out, out_end, stop = range(256, 261)
    call = [start, *b"12+34", end, out, *b"46", out_end]
    ids = [*b"so ", *call, *call, *b" it is \xf0\x9f", stop]
    python, output = {"type": "python", "text": "12+34"}, {"type": "python_output", "text": "46"}
    before, after = {"type": "text", "text": "so "}, {"type": "text", "text": " it is \ufffd"}
    assert parts_of(ids, tok) == [before, python, output, python, output, after]
    assert parts_of([start, *b"1", end, start, *b"2", end], tok) == [
        {"type": "python", "text": c} for c in "12"
    ]
    assert answer_of(ids, tok) == "so  it is \ufffd"
    assert parts_of([], tok) == [] and answer_of([stop], tok) == ""


@settings(max_examples=300, deadline=None)
@given(
    st.text("ab#", max_size=12),
    st.lists(st.text("ab#", max_size=4), max_size=3),
    st.lists(st.integers(0, 12), max_size=4),
)
def test_stop_holdback(text: str, stops: list, cuts: list) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    stop_filter = StopFilter(stops)
    found = "".join(stop_filter.push(text[a:b]) for a, b in itertools.pairwise(borders)) + stop_filter.flush()
    matches = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop and stop in text]
    end, minus_length = min(matches, default=(len(text), 0))
    assert found == text[: end + minus_length]
    assert stop_filter.is_hit == bool(matches)


def test_holds_back_no_more_than_needed() -> None:
    stop_filter = StopFilter(["END"])
    assert [stop_filter.push(piece) for piece in ("hello", " E", "N", "x", "EN", "D tail")] == [
        "hello",
        " ",
        "",
        "ENx",
        "",
        "",
    ]
    assert stop_filter.is_hit and stop_filter.flush() == ""
