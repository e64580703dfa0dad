"""What the demo concludes from what it measured."""

from __future__ import annotations

import json
import math
import signal

import pytest
from rich.console import Console

from pd_connector.demo.client import Answer
from pd_connector.demo.interrupts import Interrupts
from pd_connector.demo.prompts import PROMPT_TOKENS, random_prompts
from pd_connector.demo.report import as_json, proof, times, verdict
from pd_connector.demo.verdict import STAGES, Mismatch, Row, compare, kv_bytes

MODEL = {"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 64}


def answer(*positions: tuple[int, dict[int, float]]) -> Answer:
    return Answer(tuple(token for token, _ in positions), tuple(listed for _, listed in positions), 0.1, {})


def row(**changed: object) -> Row:
    good: dict[str, object] = {
        "prompt_tokens": 129,
        "mismatch": None,
        "digests_compared": 8,
        "failed_transfers": 0,
        "recomputed_tokens": 0,
        "kv_bytes": 524288,
        "kv_bytes_expected": 524288,
        "transport": "zmq",
        "ttft_ms": dict.fromkeys(STAGES, 1.0),
        "plain_ttft_ms": 5.0,
    }
    return Row(**{**good, **changed})  # type: ignore[arg-type]


def test_equal_tokens() -> None:
    same = answer((5, {5: -1.0, 6: -2.0}))
    assert compare(same, same) is None


@pytest.mark.parametrize(
    ("plain", "handed", "margin"),
    [
        ({5: -1.0, 6: -1.0}, {6: -1.0, 5: -1.0}, 0.0),
        ({5: -1.0, 6: -1.25}, {6: -1.0, 5: -1.0}, 0.0),
        ({5: -1.0, 6: -1.25}, {6: -1.0, 5: -1.5}, 0.25),
        ({5: -1.0, 7: -1.0}, {6: -1.0, 7: -1.0}, math.inf),
    ],
)
def test_a_mismatch_has_the_smaller_margin(plain: dict[int, float], handed: dict[int, float], margin: float) -> None:
    before = (3, {3: 0.0})
    found = compare(answer(before, (5, plain), (1, {1: 0.0})), answer(before, (6, handed), (2, {2: 0.0})))
    assert found == Mismatch(1, margin)
    assert found.is_tie == (margin == 0)


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 0), (2, 1), (128, 1), (129, 2), (3000, 24)])
def test_kv_bytes_of_whole_blocks(tokens: int, blocks: int) -> None:
    assert kv_bytes(tokens, 128, MODEL) == blocks * 128 * 4 * 2 * 64 * 2 * 2


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"mismatch": Mismatch(3, 0.5)}, "token 3 differs"),
        ({"failed_transfers": 1}, "failed"),
        ({"digests_compared": 0}, "no digest"),
        ({"recomputed_tokens": 1}, "computed 1 tokens"),
        ({"kv_bytes": 0}, "0 bytes moved"),
        ({"kv_bytes": 1048576}, "1048576 bytes moved"),
    ],
)
def test_every_fault_fails(changed: dict[str, object], told: str) -> None:
    bad = row(**changed)
    assert [told in complaint for complaint in bad.complaints()] == [True]
    assert verdict([row(), bad]) == "fail"


def test_good_rows_pass() -> None:
    single = row(prompt_tokens=1, digests_compared=0, kv_bytes=0, kv_bytes_expected=0, transport="none")
    rows = [single, row(), row(mismatch=Mismatch(9, 0.0))]
    assert verdict(rows) == "pass"
    assert [entry["digests_equal"] for entry in json.loads(as_json(rows))["prompts"]] == [None, True, True]


def test_nothing_measured_is_no_pass() -> None:
    assert verdict([]) == "fail"


def test_json_has_no_infinity() -> None:
    parsed = json.loads(as_json([row(mismatch=Mismatch(0, math.inf))]), parse_constant=pytest.fail)
    assert parsed["prompts"][0]["mismatch"] == {"position": 0, "margin": None}


def test_tables_fit_a_terminal() -> None:
    console = Console(width=80, record=True)
    slow = row(ttft_ms=dict.fromkeys(STAGES, 99999.0), prompt_tokens=3000, mismatch=Mismatch(15, 0.0625))
    console.print(proof([slow]), times([slow]))
    text = console.export_text()
    assert "…" not in text
    assert str(99999 * len(STAGES)) in text


def test_prompts_share_no_first_block() -> None:
    prompts = random_prompts(PROMPT_TOKENS, 2045, seed=0)
    assert [len(prompt) for prompt in prompts] == list(PROMPT_TOKENS)
    assert len({tuple(prompt[:16]) for prompt in prompts}) == len(prompts)
    assert prompts == random_prompts(PROMPT_TOKENS, 2045, seed=0)
    assert prompts != random_prompts(PROMPT_TOKENS, 2045, seed=1)


def interrupted_while_held(interrupts: Interrupts, reached: list[str]) -> None:
    with interrupts.held():
        signal.raise_signal(signal.SIGTERM)
        reached.append("the end of the block")


def test_an_interrupt_waits_while_it_is_held() -> None:
    reached: list[str] = []
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            interrupted_while_held(interrupts, reached)
        assert reached
        # Said once, it holds, also where foreign code swallowed the exception.
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
