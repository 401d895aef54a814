"""How the next token is chosen: the settings mean what they say, and the draws follow the probabilities."""

import math

import pytest
import torch
from conftest import hugging_face_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neox_lib.sampling import GREEDY, Sampling, top_k_mask, top_p_mask
from tests.small_models import BASE

# few different scores, so that ties are common: in fp16 the two best logits are often equal
scores = st.lists(st.integers(-8, 8).map(lambda n: n / 4), min_size=1, max_size=30)


def row(values: list[float]) -> Tensor:
    return torch.tensor([values], dtype=torch.float32)


def top_p_count(shares: list[float], p: float) -> int:
    """How many tokens top-p keeps of these probabilities."""
    probabilities = torch.tensor([shares], dtype=torch.float64)
    order = probabilities.argsort(dim=-1, descending=True, stable=True)
    return int(top_p_mask(probabilities, order, p).sum())


def kept(probabilities: Tensor) -> set[int]:
    return set(probabilities[0].nonzero()[:, 0].tolist())


@settings(deadline=None)
@given(scores, st.floats(0.05, 20))
def test_temperature_divides_the_logits(values, temperature):
    found = Sampling(temperature=temperature).probabilities(row(values))[0].tolist()
    weights = [math.exp((value - max(values)) / temperature) for value in values]
    assert found == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-9)


@settings(deadline=None)
@given(scores, st.floats(0.05, 5), st.integers(1, 40))
def test_top_k_keeps_exactly_the_k_likeliest(values, temperature, k):
    """Equal scores are common in fp16; letting all of them in would make top_k=1 a lottery."""
    found = Sampling(temperature=temperature, top_k=k).probabilities(row(values))
    likeliest_first = sorted(range(len(values)), key=lambda index: (-values[index], index))
    assert kept(found) == set(likeliest_first[:k])
    assert found.sum().item() == pytest.approx(1)


@settings(deadline=None)
@given(scores, st.floats(0.05, 5), st.floats(0.001, 1))
def test_top_p_keeps_the_smallest_set_that_reaches_p(values, temperature, p):
    """One token fewer must fall short of p, and no set of that size reaches it: the likeliest are the best choice."""
    everything = Sampling(temperature=temperature).probabilities(row(values))
    found = Sampling(temperature=temperature, top_p=p).probabilities(row(values))
    chosen, margin = sorted(everything[0, list(kept(found))].tolist()), 1e-12
    assert sum(chosen) >= p - margin
    assert sum(chosen[1:]) < p + margin
    assert chosen == sorted(everything[0].tolist())[-len(chosen) :]
    assert found[0].tolist() == pytest.approx(
        [value / sum(chosen) if index in kept(found) else 0 for index, value in enumerate(everything[0].tolist())]
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.floats(0.01, 0.99))
def test_no_smaller_set_reaches_the_total(weights, total):
    """Checked against every subset there is."""
    shares = [weight / sum(weights) for weight in weights]
    subsets = [[share for bit, share in enumerate(shares) if mask >> bit & 1] for mask in range(2 ** len(shares))]
    smallest = min(len(subset) for subset in subsets if sum(subset) >= total)
    nearly = min(abs(sum(subset) - total) for subset in subsets)
    if nearly > 1e-9:  # on the very edge rounding may decide
        assert top_p_count(shares, total) == smallest


def test_a_set_that_reaches_p_exactly_is_enough():
    """These shares add up without rounding, so the edge itself can be tried."""
    shares = [0.25, 0.5, 0.125, 0.125]
    assert [top_p_count(shares, p) for p in (0.5, 0.51, 0.75, 0.76, 0.875, 1.0)] == [1, 2, 2, 3, 3, 4]


def test_each_row_has_a_set_of_its_own():
    """A batch in which one row is certain and one is not."""
    certain, open_ = [9.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]
    found = Sampling(temperature=1.0, top_p=0.7).probabilities(torch.tensor([certain, open_]))
    assert (found > 0).sum(-1).tolist() == [1, 3]


def test_top_p_of_one_cuts_nothing():
    logits = torch.linspace(0, -30, 3000)[None]
    assert torch.equal(
        Sampling(temperature=1.0, top_p=1.0).probabilities(logits), Sampling(temperature=1.0).probabilities(logits)
    )


def test_top_p_works_on_what_top_k_left():
    """The order is that of Hugging Face: first the k likeliest, then p of their shares."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    found = Sampling(temperature=1.0, top_k=2, top_p=0.6).probabilities(logits)
    assert found[0].tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])
    found = Sampling(temperature=1.0, top_k=2, top_p=0.55).probabilities(logits)
    assert found[0].tolist() == [1, 0, 0, 0]


@pytest.fixture(scope="module")
def theirs():
    from transformers import GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(hugging_face_config(BASE))


# transformers keeps all that equal the k-th, we keep k
different_scores = st.lists(st.integers(-90, 90).map(lambda n: n / 8), min_size=2, max_size=30, unique=True)


@settings(max_examples=300, deadline=None)
@given(
    values=different_scores,
    said=st.fixed_dictionaries(
        {},
        optional={
            "repetition_penalty": st.floats(0.3, 4),
            "temperature": st.floats(0.3, 3),
            "top_k": st.integers(1, 40),
            "top_p": st.floats(0.05, 1),
            "min_p": st.floats(0, 1),
        },
    ),
    data=st.data(),
)
def test_all_settings_together_give_the_probabilities_of_transformers(theirs, values, said, data):
    """In its order: the penalty on the raw scores, then temperature, top-k, top-p and min-p."""
    from transformers import GenerationConfig

    ids = torch.tensor([data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=8), "ids")])
    config = GenerationConfig(do_sample=True, **said)
    scores = theirs._get_logits_processor(config, input_ids_seq_length=ids.shape[1])(ids, row(values).double())
    found = Sampling(**{"temperature": 1.0, **said}).probabilities(row(values).double(), ids)
    torch.testing.assert_close(found, scores.softmax(dim=-1), rtol=1e-9, atol=1e-12)


GREEDY_LIMITS = {
    "top_k=1": Sampling(temperature=1.7, top_k=1, seed=3),
    "a tiny top_p": Sampling(temperature=1.7, top_p=1e-9, seed=3),
    "temperature 0": Sampling(top_k=5, top_p=0.3, seed=3),
}


@pytest.mark.parametrize("name", GREEDY_LIMITS)
@settings(deadline=None)
@given(scores)
def test_the_limits_are_greedy(name, values):
    """Also among equals, of which greedy takes the first."""
    generator = torch.Generator().manual_seed(1)
    expected = row(values).argmax(-1).tolist()
    assert GREEDY_LIMITS[name].choose(row(values), generator).tolist() == expected
    assert kept(GREEDY_LIMITS[name].probabilities(row(values))) == set(expected)


@pytest.mark.parametrize("temperature", [1e-3, 1e-9, 1e-50, 1e-300])
def test_a_temperature_near_zero_is_greedy(temperature):
    """1e-50 is 0 in fp32: dividing by that would give no numbers at all."""
    logits = torch.randn(50, 100, generator=torch.Generator().manual_seed(0))
    found = Sampling(temperature=temperature).choose(logits, torch.Generator().manual_seed(0))
    assert torch.equal(found, logits.argmax(-1))


DRAWS = 40_000
LOGITS = torch.tensor([2.0, 1.0, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0, 0.25])
SETTINGS = {
    "plain": Sampling(temperature=1.0),
    "cold": Sampling(temperature=0.6),
    "hot": Sampling(temperature=2.0),
    "top_k": Sampling(temperature=1.0, top_k=4),
    "top_p": Sampling(temperature=1.2, top_p=0.8),
    "both": Sampling(temperature=0.9, top_k=6, top_p=0.9),
}


def expected_shares(name: str) -> list[float]:
    """The shares by the definitions alone, written out without the library."""
    chosen = SETTINGS[name]
    order = sorted(range(len(LOGITS)), key=lambda index: (-LOGITS[index].item(), index))
    order = order[: chosen.top_k or len(order)]
    weights = {index: math.exp(LOGITS[index].item() / chosen.temperature) for index in order}
    if chosen.top_p is not None:
        target, reached = chosen.top_p * sum(weights.values()), 0.0
        for index in order:
            if reached >= target:
                del weights[index]
            else:
                reached += weights[index]
    return [weights.get(index, 0) / sum(weights.values()) for index in range(len(LOGITS))]


def chi_square(name: str, drawn_with: str) -> tuple[float, float]:
    """Pearson's statistic of DRAWS tokens against the shares of `name`, and the bound it should stay under.

    It has a mean of n - 1 and a variance of 2 (n - 1); five standard deviations above happens once in 10,000 seeds.
    """
    tokens = SETTINGS[drawn_with].choose(LOGITS.expand(DRAWS, -1), torch.Generator().manual_seed(7))
    counts = torch.bincount(tokens, minlength=len(LOGITS)).tolist()
    cells = [(count, share * DRAWS) for count, share in zip(counts, expected_shares(name), strict=True) if share]
    assert sum(count for count, _ in cells) == DRAWS or name != drawn_with, "a token of share 0 was drawn"
    freedom = len(cells) - 1
    return sum((count - mean) ** 2 / mean for count, mean in cells), freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_follow_the_probabilities(name):
    """What is called sampling at temperature 0.6 must be that, not something near it."""
    statistic, bound = chi_square(name, drawn_with=name)
    assert statistic < bound


@pytest.mark.parametrize(
    ("name", "wrong"), [("cold", "plain"), ("top_k", "plain"), ("top_p", "plain"), ("both", "top_k")]
)
def test_wrong_frequencies_are_noticed(name, wrong):
    """The same statistic on draws that ignore a setting is far over the bound."""
    statistic, bound = chi_square(name, drawn_with=wrong)
    assert statistic > 10 * bound


@pytest.mark.parametrize(("point", "expected"), [(0.0, 1), (1 - 2**-53, 3)])
def test_a_token_of_probability_zero_is_not_drawn_at_the_ends(monkeypatch, point, expected):
    """Random numbers include 0.0 exactly; then a token that was cut off must not come out."""
    logits = torch.tensor([[-math.inf, 0.0, 1.0, 0.3, -math.inf]])
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, generator: torch.full(shape, point, dtype=dtype))
    assert Sampling(temperature=1.0).choose(logits, torch.Generator()).tolist() == [expected]


def test_a_seed_means_the_same_again_and_another_seed_something_else():
    logits = torch.zeros(64, 50)

    def draw(seed: int) -> list[int]:
        return Sampling(temperature=1.0).choose(logits, torch.Generator().manual_seed(seed)).tolist()

    assert draw(5) == draw(5)
    assert len({tuple(draw(seed)) for seed in range(20)}) == 20


def test_rows_of_a_batch_are_drawn_independently():
    drawn = Sampling(temperature=1.0).choose(torch.zeros(1000, 10), torch.Generator().manual_seed(0))
    assert torch.bincount(drawn, minlength=10).min() > 50


def test_half_precision_logits_are_drawn_from_in_full_precision():
    """The sum of 50,000 fp16 probabilities would be far from 1."""
    found = Sampling(temperature=1.0).probabilities(torch.zeros(1, 50_000, dtype=torch.float16))
    assert found.dtype == torch.float64
    assert found[0, 0].item() == pytest.approx(1 / 50_000)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", 0),
        ("top_k", -3),
        ("top_k", 2.5),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", -0.5),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", math.nan),
        ("seed", -1),
        ("seed", 1.5),
        ("seed", 2**64),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be .* got {value}"):
        Sampling(**{name: value})


@pytest.mark.parametrize("wrong", ["", ["a", ""], [b"a"], 3, None])
def test_a_stop_string_that_is_no_text_is_named(wrong):
    """An empty one would stand everywhere, and end each text at once."""
    with pytest.raises(ValueError, match="stop_strings must be texts of at least one character"):
        Sampling(stop_strings=wrong)


def test_one_stop_string_may_stand_for_itself():
    assert Sampling(stop_strings="ab") == Sampling(stop_strings=["ab"]) == Sampling(stop_strings=("ab",))


def test_a_penalty_without_the_text_is_refused():
    """A learner's loop of before the penalty would else write as if there were none."""
    with pytest.raises(ValueError, match=r"repetition_penalty is 1\.2, which needs the ids so far; pass ids="):
        Sampling(repetition_penalty=1.2).choose(row([1.0, 2.0]))


def test_the_default_is_greedy():
    assert Sampling(temperature=0.0, top_k=None, top_p=None, seed=0) == GREEDY


def test_masks_are_in_vocabulary_order_and_of_equals_the_lower_id_stays():
    """A mask in the order of the sort would keep other tokens; letting the higher id stay would change texts."""
    probabilities = torch.tensor([[0.1, 0.3, 0.3, 0.3], [0.4, 0.1, 0.1, 0.4]], dtype=torch.float64)
    order = probabilities.argsort(dim=-1, descending=True, stable=True)
    expected = [[False, True, True, False], [True, False, False, True]]
    assert top_k_mask(order, 2).tolist() == top_p_mask(probabilities, order, 0.55).tolist() == expected


# The first tokens that each setting draws from TIED, as the library drew them when its first texts were stored.
TIED = ((torch.arange(2048) * 37 % 101) / 16)[None]  # 101 different scores, each about 20 times
DRAWN = {
    Sampling(1.0, seed=1): [128, 461, 480, 363, 1140, 226, 941, 1449],
    Sampling(0.8, top_k=50, seed=2): [1777, 161, 1272, 939, 1777, 898, 232, 464],
    Sampling(1.3, top_p=0.9, seed=3): [68, 584, 1580, 357, 1545, 1242, 409, 886],
    Sampling(1.1, top_k=300, top_p=0.7, seed=4): [969, 1493, 120, 1927, 1938, 1130, 838, 1553],
}


@pytest.mark.parametrize("sampling", DRAWN, ids=repr)
def test_a_seed_goes_on_giving_the_tokens_it_always_gave(sampling):
    """Stored notebooks, saved playgrounds and shared seeds count on it."""
    generator = torch.Generator().manual_seed(sampling.seed)
    assert [sampling.choose(TIED, generator).item() for _ in range(8)] == DRAWN[sampling]
