"""The balance against another solver, on its constraints, and on how much it keeps."""

import re
from pathlib import Path

import numpy as np
import pytest

from data_tools.filter.balance import group, moments, solve, subsample
from data_tools.filter.balance_spec import BalanceSpec, load_spec, parse_spec
from siglip_train.data.shards.fields import Field
from siglip_train.data.shards.reader import read_samples
from siglip_train.errors import UserError

DATA = Path(__file__).parents[3] / "shared" / "data"
GENDER = {"woman": r"\b(woman|women|girls?|she|her)\b", "man": r"\b(man|men|boys?|he|his)\b"}


def spec_of(values: int = 2, concepts: int = 2, **more) -> BalanceSpec:
    return parse_spec({
        "attributes": {"a": {f"v{number}": "x" for number in range(values)}},
        "concepts": {f"c{number}": "x" for number in range(concepts)}, **more,
    })  # fmt: skip


def draw(count: int, seed: int, values: int = 2, concepts: int = 2) -> np.ndarray:
    """`[n, values + concepts]`: skewed values, some samples with none or several, concepts that follow the first."""
    random = np.random.default_rng(seed)
    value = random.choice(values + 1, count, p=[0.2, *([0.5] + [0.3 / (values - 1)] * (values - 1))])
    shows = np.stack([value == number + 1 for number in range(values)], axis=1)
    shows |= random.random(shows.shape) < 0.05
    chance = np.where(shows[:, :1], 0.5, 0.2)
    return np.concatenate((shows, random.random((count, concepts)) < chance), axis=1)


def constraints(spec: BalanceSpec, shows: np.ndarray, eps: float) -> np.ndarray:
    """`[rows, n]`, restated sample by sample: rows @ q <= 0."""
    values = len(spec.values)
    rows = []
    targets = list((spec.targets["a"] or {}).values())
    for conditions in [np.ones(len(shows), bool), *shows[:, values:].T]:
        for number in range(values):
            row = np.zeros((2, len(shows)))
            for place, sample in enumerate(shows):
                shown = sample[:values].sum()
                if shown and conditions[place]:
                    off = sample[number] / shown - targets[number]
                    row[:, place] = off - eps, -off - eps
            rows.append(row)
    return np.concatenate(rows)


def by_dykstra(rows: np.ndarray, cycles: int = 4000) -> np.ndarray:
    """The point nearest to (1, ..., 1) in the unit cube with rows @ q <= 0, by projections in turn."""
    count = rows.shape[1]
    rows = rows[(rows**2).sum(axis=1) > 0]
    q, memory = np.ones(count), np.zeros((len(rows) + 1, count))
    for _ in range(cycles):
        for number, row in enumerate(rows):
            shifted = q + memory[number]
            q = shifted - max(row @ shifted, 0) / (row @ row) * row
            memory[number] = shifted - q
        shifted = q + memory[-1]
        q = np.clip(shifted, 0, 1)
        memory[-1] = shifted - q
    return q


@pytest.mark.parametrize(("values", "concepts", "seed"), [(2, 0, 0), (2, 2, 1), (3, 1, 2), (3, 3, 3)])
def test_the_weights_are_those_of_another_solver(values: int, concepts: int, seed: int) -> None:
    spec = spec_of(values, concepts, eps=0.02)
    shows = draw(80, seed, values, concepts)
    patterns, groups, sizes = group(shows)
    problem = moments(spec, patterns, sizes)
    assert not problem.left_out
    weights = solve(problem, sizes, spec.eps)[groups]
    rows = constraints(spec, shows, spec.eps)
    assert (rows @ weights).max() <= 1e-9
    assert weights.min() >= 0
    assert weights.max() <= 1
    expected = by_dykstra(rows)
    # eps is approached to one part in a thousand
    np.testing.assert_allclose(weights, expected, atol=0.005)
    assert ((1 - weights) ** 2).sum() <= ((1 - expected) ** 2).sum() * 1.005 + 1e-6


def test_scipy_agrees() -> None:
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is not installed")
    spec = spec_of(2, 2, eps=0.01)
    shows = draw(50, 5)
    patterns, groups, sizes = group(shows)
    weights = solve(moments(spec, patterns, sizes), sizes, spec.eps)[groups]
    rows = constraints(spec, shows, spec.eps)
    found = optimize.minimize(
        lambda q: ((1 - q) ** 2).sum() / 2, np.ones(50), jac=lambda q: q - 1, bounds=[(0, 1)] * 50, method="SLSQP",
        constraints={"type": "ineq", "fun": lambda q: -rows @ q, "jac": lambda q: -rows},
    )  # fmt: skip
    np.testing.assert_allclose(weights, found.x, atol=0.005)


def test_what_is_balanced_already_is_left_alone() -> None:
    shows = np.array([[1, 0, 1], [0, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]], dtype=bool)
    spec = spec_of(2, 1)
    patterns, _, sizes = group(shows)
    assert solve(moments(spec, patterns, sizes), sizes, spec.eps).tolist() == [1] * len(patterns)


def test_one_attribute_alone_needs_a_weight_that_a_division_gives() -> None:
    """30 of 40 show the first value: 10 of them may stay, each with a third of its weight."""
    shows = np.array([[True, False]] * 30 + [[False, True]] * 10 + [[False, False]] * 5)
    spec = spec_of(2, 0, eps=1e-4)
    patterns, groups, sizes = group(shows)
    weights = solve(moments(spec, patterns, sizes), sizes, spec.eps)[groups]
    np.testing.assert_allclose(weights, [1 / 3] * 30 + [1] * 15, atol=1e-3)


def test_targets_of_attributes_and_of_concepts() -> None:
    shows = draw(4000, 9)
    spec = spec_of(
        2,
        2,
        eps=0.005,
        targets={"a": {"v1": 0.3, "v0": 0.7}},
        concept_targets={"c1": {"a": {"v0": 0.4, "v1": 0.6}}},
    )
    patterns, _, sizes = group(shows)
    problem = moments(spec, patterns, sizes)
    after = problem.shares(sizes * solve(problem, sizes, spec.eps))
    wanted = [0.7, 0.3, 0.7, 0.3, 0.4, 0.6]
    np.testing.assert_allclose(after, wanted, atol=0.005 + 1e-9)
    assert np.abs(problem.shares(sizes.astype(float)) - wanted).max() > 0.1


def test_as_is_keeps_the_share_and_breaks_the_association() -> None:
    shows = draw(4000, 10)
    spec = spec_of(2, 2, targets={"a": "as-is"})
    patterns, _, sizes = group(shows)
    problem = moments(spec, patterns, sizes)
    before, after = (
        problem.shares(counts) for counts in (sizes.astype(float), sizes * solve(problem, sizes, spec.eps))
    )
    assert before[2] - before[0] > 0.05
    np.testing.assert_allclose(after, np.tile(before[:2], 3), atol=spec.eps + 1e-9)


def test_what_nothing_can_balance_is_said() -> None:
    shows = np.array([[1, 0, 0], [1, 0, 1], [0, 1, 0]], dtype=bool)
    patterns, _, sizes = group(shows)
    problem = moments(spec_of(2, 1), patterns, sizes)
    assert problem.left_out == ["c0 by a: every sample shows v0"]
    assert len(problem.moments) == 2
    with pytest.raises(UserError, match="a cannot be balanced: every sample shows v0"):
        moments(spec_of(2, 1), patterns[1:], sizes[1:])


def test_subsampling_keeps_the_share_of_each_group_whatever_the_order() -> None:
    random = np.random.default_rng(0)
    groups = random.integers(0, 4, 3000)
    digests = random.integers(0, 2**64, 3000, dtype=np.uint64)
    weights = np.array([0.0, 0.25, 0.9, 1.0])
    stays = subsample(groups, weights, digests, np.full(4, 0.5))
    sizes = np.bincount(groups)
    np.testing.assert_allclose(np.bincount(groups[stays], minlength=4), sizes * weights, atol=1)
    assert stays[groups == 3].all()
    order = random.permutation(3000)
    assert (subsample(groups[order], weights, digests[order], np.full(4, 0.5)) == stays[order]).all()
    # a larger share keeps what a smaller one kept
    more = subsample(groups, weights / 2, digests, np.full(4, 0.5))
    assert (more <= stays).all()


@pytest.mark.skipif(not DATA.exists(), reason="../shared/data is absent")
def test_people_and_sport_of_real_captions() -> None:
    spec = parse_spec({
        "attributes": {"gender": GENDER}, "eps": 0.02,
        "concepts": {"sport": r"\b(ski\w*|snowboard\w*|surf\w*|skateboard\w*|tennis|baseball|frisbee|ball)\b"},
    })  # fmt: skip
    fields = [Field.parse("txt"), Field.parse("json:captions")]
    captions = [
        [text for field in fields for _, text in field.texts(sample)]
        for sample in read_samples(str(DATA / "captions_coco"))
    ]
    patterns = [*GENDER.values(), spec.concepts["sport"].pattern.pattern]
    shows = np.array([
        [any(re.search(pattern, text, re.IGNORECASE) for text in texts) for pattern in patterns] for texts in captions
    ])  # fmt: skip
    groups_of, groups, sizes = group(shows)
    problem = moments(spec, groups_of, sizes)
    weights = solve(problem, sizes, spec.eps)[groups]
    for condition in (shows[:, :2].any(axis=1), shows[:, :2].any(axis=1) & shows[:, 2]):
        share = shows[condition, 0] / shows[condition, :2].sum(axis=1)
        before, after = share.mean(), np.average(share, weights=weights[condition])
        assert before < 0.3
        assert abs(after - 0.5) <= 0.02 + 1e-9
    # whoever shows no gender, or is in the minority, stays whole
    assert (weights[~shows[:, :2].any(axis=1)] == 1).all()
    assert (weights[shows[:, 0] & ~shows[:, 1]] > 0.99).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1", "must be a mapping"),
        ("attributes: {g: {a: x, b: y}}\nconcept: {}", "unknown concept"),
        ("attributes: {g: {a: x}}", "g has one"),
        ("attributes: {}", "two values"),
        ("attributes: {g: {a: x, b: '('}}", "no regular expression"),
        ("attributes: {g: {a: x, b: 3}}", "must be a regular expression"),
        ("attributes: {g: {a: x, b: {where: 'json:x'}}}", "FIELD OP VALUE"),
        ("attributes: {g: {a: x, b: y}}\ntargets: {h: {a: 1}}", "targets names h; there are g"),
        ("attributes: {g: {a: x, b: y}}\ntargets: {g: {a: 1}}", "no share of b"),
        ("attributes: {g: {a: x, b: y}}\ntargets: {g: {a: 1, b: 1}}", "add up to 1"),
        ("attributes: {g: {a: x, b: y}}\ntargets: {g: {a: 2, b: -1}}", "from 0 to 1"),
        ("attributes: {g: {a: x, b: y}}\neps: 0", "0 < eps < 1"),
        ("attributes: {g: {a: x, b: y}}\nconcept_targets: {c: {}}", "there are none"),
        ("a: [", "neither YAML nor JSON"),
    ],
)
def test_mistakes_in_a_specification(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        load_spec(str(tmp_path / "spec.yaml"))
    assert "\n" not in str(raised.value)
