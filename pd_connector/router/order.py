"""What a client asked for, as a list of choices that are each served by one prefill leg and one decode leg. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from pd_connector.router.faults import bad_request

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"

PREFILL_TICKET = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


@dataclass(frozen=True, slots=True)
class Choice:
    """One prompt, one answer. ``body`` is the client's own, but for n, prompt and seed when the request has several."""

    path: str
    body: dict[str, Any]

    @property
    def stream(self) -> bool:
        return bool(self.body.get("stream"))

    def estimated_tokens(self) -> int:
        """About how long the prompt is: token ids count, text has about four bytes per token."""
        prompt = self.body.get("messages" if self.path == CHAT else "prompt")
        if isinstance(prompt, list) and all(type(item) is int for item in prompt):
            return len(prompt)
        return len(orjson.dumps(prompt)) // 4

    def prefill_body(self, params: dict[str, Any]) -> bytes:
        """The prefill leg: the same prompt, one token, nothing streamed, KV kept for a remote decode, on which
        ``params`` says more."""
        body = {key: value for key, value in self.body.items() if key not in ("stream_options", "min_tokens")}
        body |= {"max_tokens": 1, "n": 1, "stream": False, "kv_transfer_params": PREFILL_TICKET | params}
        if self.path == CHAT or "max_completion_tokens" in body:
            body["max_completion_tokens"] = 1
        return orjson.dumps(body)

    def decode_body(self, ticket: dict[str, Any] | None) -> bytes:
        # A ticket is P's to give: what a client wrote there is dropped, or it could point D at any host.
        body = {key: value for key, value in self.body.items() if key != "kv_transfer_params"}
        if ticket is not None:
            body["kv_transfer_params"] = ticket
        return orjson.dumps(body)


@dataclass(frozen=True, slots=True)
class Order:
    """One client request: its choices in the order of their index, ``prompt * n + i``."""

    choices: tuple[Choice, ...]
    n: int
    stream: bool


def parse(path: str, raw: bytes, max_choices: int) -> Order:
    """Read a request body. Raises Fault (400) naming the field that cannot be served and what to send instead."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise bad_request(f"the request body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise bad_request("the request body must be a JSON object")
    stream = _flag(body, "stream")
    n = _count_per_prompt(body)
    if _flag(body, "use_beam_search"):
        raise bad_request("use_beam_search cannot be split into prefill and decode; ask an instance directly")
    prompts = [None] if path == CHAT else _prompts(body)
    if len(prompts) * n > max_choices:
        raise bad_request(
            f"{len(prompts)} prompt(s) times n={n} is more than the {max_choices} choices one request may have here; "
            "send several smaller requests"
        )
    if len(prompts) * n == 1:
        return Order((Choice(path, body),), n, stream)
    choices = tuple(_choice(path, body, prompt, i) for prompt in prompts for i in range(n))
    return Order(choices, n, stream)


def _choice(path: str, body: dict[str, Any], prompt: Any, i: int) -> Choice:
    own = body | {"n": 1}
    own.pop("best_of", None)
    if prompt is not None:
        own["prompt"] = prompt
    if type(body.get("seed")) is int:
        # One seed for all would make all choices of a prompt the same; vLLM adds the index as well.
        own["seed"] = (body["seed"] + i) % 2**64
    return Choice(path, own)


def _flag(body: dict[str, Any], key: str) -> bool:
    value = body.get(key)
    if value is not None and not isinstance(value, bool):
        raise bad_request(f"{key} must be true or false")
    return bool(value)


def _count_per_prompt(body: dict[str, Any]) -> int:
    n = 1 if body.get("n") is None else body["n"]
    if type(n) is not int or n < 1:
        raise bad_request("n must be a whole number of at least 1")
    best_of = n if body.get("best_of") is None else body["best_of"]
    if type(best_of) is not int or best_of != n:
        raise bad_request(
            f"best_of={best_of!r} is not served: every choice is decoded once; leave it out or set it to n={n}"
        )
    return n


def _prompts(body: dict[str, Any]) -> list[Any]:
    """The prompts of a completion request; [None] for the single one that stays where it is."""
    prompt = body.get("prompt")
    if body.get("prompt_embeds") is not None:
        if prompt is not None or isinstance(body["prompt_embeds"], list):
            raise bad_request("prompt_embeds is served for one prompt per request, without a prompt beside it")
        return [None]
    if not isinstance(prompt, list) or all(type(item) is int for item in prompt):
        return [None]
    texts = all(isinstance(item, str) for item in prompt)
    tokens = all(isinstance(item, list) and all(type(token) is int for token in item) for item in prompt)
    if not texts and not tokens:
        raise bad_request("prompt must be a string, a list of strings, a list of token ids or a list of such lists")
    return prompt
