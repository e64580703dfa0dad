"""The router's parts that do no I/O: which upstream, what was asked, where events end, choices made one answer."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pd_connector.errors import ConfigError
from pd_connector.protocol.params import transfer_params
from pd_connector.router import RouterSettings
from pd_connector.router.faults import Fault
from pd_connector.router.merge import StreamMerge, merge_plain, sum_usage
from pd_connector.router.order import CHAT, COMPLETIONS, parse
from pd_connector.router.policy import Balancer
from pd_connector.router.sse import EventSplitter, data_of
from pd_connector.router.upstream import check_urls

TRANSFER = bytes(range(16))


def test_ties_go_round():
    balancer = Balancer(["a", "b", "c"], cooldown_s=3)
    taken = []
    for _ in range(6):
        name = balancer.take(0.0)
        taken.append(name)
        balancer.give_back(name)
    assert taken == ["a", "b", "c", "a", "b", "c"]


def test_least_in_flight_first():
    balancer = Balancer(["a", "b"], cooldown_s=3)
    assert [balancer.take(0.0) for _ in range(3)] == ["a", "b", "a"]
    balancer.give_back("a")
    balancer.give_back("a")
    assert [balancer.take(0.0) for _ in range(3)] == ["a", "b", "a"]
    assert (balancer.in_flight("a"), balancer.in_flight("b")) == (2, 2)


def test_unreachable_is_put_aside_until_it_cooled_down():
    balancer = Balancer(["a", "b"], cooldown_s=3)
    balancer.unreachable("a", now=10.0)
    assert [balancer.take(12.9) for _ in range(3)] == ["b", "b", "b"], "although b has more in flight"
    assert balancer.take(13.0) == "a"


def test_unreachable_is_used_when_nothing_else_is_left():
    balancer = Balancer(["a", "b"], cooldown_s=3)
    balancer.unreachable("a", now=0.0)
    assert balancer.take(1.0, exclude={"b"}) == "a"
    assert balancer.take(1.0, exclude={"a", "b"}) is None


def test_a_success_ends_the_cool_down():
    balancer = Balancer(["a", "b"], cooldown_s=3)
    balancer.unreachable("a", now=0.0)
    balancer.reachable("a")
    assert balancer.take(1.0) == "a"


def bodies(order):
    return [choice.body for choice in order.choices]


def test_one_prompt_stays_as_it_was():
    body = {"prompt": "p", "seed": 7, "x": [1]}
    assert bodies(parse(COMPLETIONS, json.dumps(body).encode(), 128)) == [body]


@pytest.mark.parametrize("prompt", ["p", [1, 2, 3], ["p"], [[1, 2]], [], None])
def test_what_counts_as_one_prompt(prompt):
    body = {"prompt": prompt}
    assert bodies(parse(COMPLETIONS, json.dumps(body).encode(), 128)) == [body]


def test_batch_and_n_become_single_choices_in_index_order():
    body = {"prompt": ["p", "q"], "n": 2, "best_of": 2, "seed": 5}
    order = parse(COMPLETIONS, json.dumps(body).encode(), 128)
    assert order.n == 2
    assert bodies(order) == [
        {"prompt": "p", "n": 1, "seed": 5},
        {"prompt": "p", "n": 1, "seed": 6},
        {"prompt": "q", "n": 1, "seed": 5},
        {"prompt": "q", "n": 1, "seed": 6},
    ]


def test_seeds_go_round_at_the_end_of_what_json_can_carry():
    body = {"prompt": "p", "n": 2, "seed": 2**64 - 1}
    choices = parse(COMPLETIONS, json.dumps(body).encode(), 128).choices
    assert [json.loads(choice.prefill_body(transfer_params(TRANSFER, False)))["seed"] for choice in choices] == [
        2**64 - 1,
        0,
    ]


def test_prefill_body_asks_for_one_token_and_a_ticket():
    body = {"prompt": "p", "max_tokens": 50, "min_tokens": 9, "stream": True, "stream_options": {"include_usage": True}}
    choice = parse(COMPLETIONS, json.dumps(body).encode(), 128).choices[0]
    ticket = {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": None,
        "remote_port": None,
        "pdc": {"transfer": TRANSFER.hex(), "stream": False},
    }
    expected = {"prompt": "p", "max_tokens": 1, "n": 1, "stream": False, "kv_transfer_params": ticket}
    assert json.loads(choice.prefill_body(transfer_params(TRANSFER, False))) == expected
    assert json.loads(choice.decode_body({"t": 1})) == body | {"kv_transfer_params": {"t": 1}}


def test_chat_prefill_bounds_both_token_limits():
    choice = parse(CHAT, b'{"messages": [], "max_completion_tokens": 9}', 128).choices[0]
    prefill = json.loads(choice.prefill_body(transfer_params(TRANSFER, False)))
    assert (prefill["max_tokens"], prefill["max_completion_tokens"]) == (1, 1)


def test_a_client_cannot_bring_its_own_ticket():
    choice = parse(COMPLETIONS, b'{"prompt": "p", "kv_transfer_params": {"remote_host": "evil"}}', 128).choices[0]
    assert b"evil" not in choice.decode_body(None)
    assert b"evil" not in choice.decode_body({"mine": 1})
    assert b"evil" not in choice.prefill_body(transfer_params(TRANSFER, False))


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"{", "not JSON"),
        (b"[]", "JSON object"),
        (b'{"prompt": "p", "n": 0}', "n must be"),
        (b'{"prompt": "p", "n": true}', "n must be"),
        (b'{"prompt": "p", "n": "2"}', "n must be"),
        (b'{"prompt": "p", "n": 2, "best_of": 3}', "best_of=3"),
        (b'{"prompt": "p", "stream": "yes"}', "stream must be"),
        (b'{"prompt": "p", "use_beam_search": true}', "use_beam_search"),
        (b'{"prompt": ["p", 1]}', "prompt must be"),
        (b'{"prompt": [["p"]]}', "prompt must be"),
        (b'{"prompt": ["a", "b", "c"], "n": 3}', "more than the 8 choices"),
        (b'{"prompt": "p", "n": 9}', "more than the 8 choices"),
        (b'{"prompt": "p", "prompt_embeds": "AA=="}', "prompt_embeds"),
    ],
)
def test_what_cannot_be_served_is_a_400_that_names_it(body, named):
    with pytest.raises(Fault, match=named) as caught:
        parse(COMPLETIONS, body, 8)
    assert caught.value.status == 400


EVENTS = [b"data: a\n\n", b": ping\n\n", b"data: b\r\n\r\n", b"event: x\ndata: c\ndata: d\n\n"]


@given(st.lists(st.integers(0, sum(map(len, EVENTS))), max_size=12))
def test_events_are_the_same_however_the_bytes_arrive(cuts):
    stream = b"".join(EVENTS)
    edges = [0, *sorted(cuts), len(stream)]
    splitter = EventSplitter(1000)
    seen = [e for a, b in itertools.pairwise(edges) for e in splitter.feed(stream[a:b])]
    assert [data_of(event) for event in seen] == [b"a", None, b"b", b"c\nd"]


def test_an_event_without_an_end_is_bounded():
    splitter = EventSplitter(100)
    splitter.feed(b"x" * 100)
    with pytest.raises(ValueError, match="longer than 100"):
        splitter.feed(b"x")


def test_usage_counts_a_prompt_once():
    usage = {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert sum_usage(dict.fromkeys(range(4), usage), n=2) == {
        "prompt_tokens": 10,
        "completion_tokens": 12,
        "total_tokens": 22,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def test_plain_answers_are_merged_by_index():
    answers = [json.dumps({"id": f"c-{k}", "choices": [{"index": 0, "text": k}]}).encode() for k in range(3)]
    merged = json.loads(merge_plain(answers, 3))
    assert merged == {"id": "c-0", "choices": [{"index": k, "text": k} for k in range(3)]}


def test_a_merged_stream_refuses_an_error_event():
    with pytest.raises(ValueError, match="boom"):
        StreamMerge(2).rewrite(0, b'data: {"error": {"message": "boom"}}\n\n')


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"retries": 99}, "'retries' is 99"),
        ({"retries": 1.5}, "whole number"),
        ({"connect_s": "5"}, "'connect_s' must be a number"),
        ({"connect_s": float("nan")}, "'connect_s'"),
        ({"max_choices": 64, "max_in_flight": 8}, "lower the first"),
        ({"abandon_grace_s": 10}, "'abandon_grace_s'"),
    ],
)
def test_settings_have_bounds(setting, named):
    with pytest.raises(ConfigError, match=named):
        RouterSettings(**setting)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://h:1",
        "http://",
        "http://h:99999",
        "http://h:0",
        "http://h:x",
        "http://h/?q=1",
        "http://a b:1",
    ],
)
def test_malformed_upstream_urls_are_config_errors(url):
    with pytest.raises(ConfigError, match="http://host:port"):
        check_urls("prefill", [url])


def test_upstream_lists_are_checked():
    with pytest.raises(ConfigError, match="at least one decode"):
        check_urls("decode", [])
    with pytest.raises(ConfigError, match="listed twice"):
        check_urls("decode", ["http://h:1", "http://h:1/"])
    with pytest.raises(ConfigError, match="user or password") as caught:
        check_urls("decode", ["http://me:s3cret@h:1"])
    assert "s3cret" not in str(caught.value)
    assert check_urls("decode", ["http://h:1/base/", "https://[::1]:2"]) == ["http://h:1/base", "https://[::1]:2"]
