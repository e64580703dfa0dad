"""What both halves of the scheduler side share: facts of the engine, the agent that answers, orders for the workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pd_connector.cache.prefix import extend_key, prefix_keys, root_key
from pd_connector.errors import ConfigError
from pd_connector.protocol import events as ev
from pd_connector.runtime.agent import Agent
from pd_connector.runtime.portal import Portal
from pd_connector.vllm_plugin import compat
from pd_connector.vllm_plugin.accounts import Accounts
from pd_connector.vllm_plugin.identity import model_identity
from pd_connector.vllm_plugin.metadata import StepOrders
from pd_connector.vllm_plugin.settings import instance_config

STATES = "its states lie in several blocks (mamba_cache_mode), which are not handed over"


class Side:
    """The agent runs in a portal; ``note`` gets what it says, on the portal's thread."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, note: Callable[[ev.Note], None]) -> None:
        transfer = vllm_config.kv_transfer_config
        self.engine_id = str(transfer.engine_id)
        self.produces, self.consumes = bool(transfer.is_kv_producer), bool(transfer.is_kv_consumer)
        self.groups = compat.transfer_groups(kv_cache_config)
        specs = [kv_cache_config.kv_cache_groups[group].kv_cache_spec for group in self.groups]
        self.block_tokens = tuple(int(spec.block_size) for spec in specs)
        self.states = tuple(compat.is_state(spec) for spec in specs)
        self.late = tuple(compat.is_state(spec) or compat.forgets(spec) for spec in specs)
        """Groups whose blocks are freed, or written over, while a prompt is computed."""
        self.config = instance_config(vllm_config)
        if self.config.strict and getattr(transfer, "kv_load_failure_policy", "") != "fail":
            raise ConfigError('strict needs "kv_load_failure_policy": "fail": a failed load would be computed again')
        self.model = self.config.model or model_identity(vllm_config.model_config)
        self.counters: Counter[str] = Counter()
        self.orders = StepOrders()
        self.portal = Portal("pdc-scheduler", self.config.io_cpus)
        self.agent = Agent(self.config, name=self.engine_id, on_note=note)
        self.agent.identify(self.model)
        self.portal.call(self.agent.start)
        self.accounts = Accounts(partial(self.portal.post, self.agent.inform))

    @property
    def shortens(self) -> bool:
        """Prefills for others leave the last prompt token out: late groups are those after the last one."""
        return any(self.late)

    def key(self, request: Any, tokens: int) -> bytes:
        """The canonical prefix key of the first ``tokens`` tokens of a request's prompt."""
        return self.keys(request, request.prompt_token_ids, (tokens,))[0]

    def keys(self, request: Any, tokens: Sequence[int], counts: Sequence[int]) -> list[bytes]:
        """Those of several prefixes, ascending, of a request's ``tokens``."""
        roots = [self._root(request, count) for count in counts]
        if len(set(roots)) == 1:
            return prefix_keys(roots[0], tokens[: counts[-1]], counts)
        return [extend_key(root, tokens[:count]) for root, count in zip(roots, counts, strict=True)]

    def _root(self, request: Any, tokens: int) -> bytes:
        lora = request.lora_request.lora_name if request.lora_request is not None else ""
        media = tuple(item for item in compat.media_of(request) if item[0] < tokens)
        return root_key(model=self.model, salt=request.cache_salt or "", lora=lora, media=media)


def state_blocks(ids: Sequence[int]) -> list[int]:
    """The block of a request's state, after its last token: there is one, unless states are kept for prefixes, too."""
    return [block for block in ids if block]
