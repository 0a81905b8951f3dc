"""How much memory a stage will take, before a weight is loaded.

The passes of a stage are run on tensors that have a shape and no memory (`FakeTensorMode`), through
the model's own code, and every storage that lives is counted. What is not run but worked out: the
optimizer's states. What is not counted: what a device's context and libraries take beside PyTorch's
allocator, and the allocator's own slack.

Linear layers are stood in for by `AdaptedLinear`, which does what PEFT's LoRA layers and
bitsandbytes' 4-bit layers do, tensor by tensor: neither can be built on such tensors.
"""

from __future__ import annotations

import copy
import gc
import re
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hcrlhf.backbone import LoraOptions, token_chunk, token_log_probs
from hcrlhf.errors import InputError
from hcrlhf.gradients import known_gradient
from hcrlhf.machine import is_target
from hcrlhf.rollouts import draw

BLOCK, NESTED_BLOCK = 64, 256  # of NF4, quantised twice: weights per scale, scales per scale
# Of the optimizer, per trained weight. Paged states may leave the card, but bitsandbytes pages only
# those of 100,000 weights and more, which no LoRA matrix of rank 8 has in a model of 3B.
STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2.03, "paged_adamw_8bit": 2.03}
FEW, MANY = 2, 4  # layers from which a deep model is foretold; a single one is no measure
STEPS = ("first token", "last token")  # of a rollout
Device = Literal["cuda", "cpu"]
_Kind = tuple[int, int, int, torch.dtype]  # of a cache's layer: heads, widths of a key and a value


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensor storages that were made inside and still live.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # autograd asks it of every fake tensor, again and again
        result = func(*args, **(kwargs or {}))
        made = [x.untyped_storage() for x in tree_leaves(result) if isinstance(x, Tensor)]
        made = [storage for storage in made if storage not in self._seen]
        if made:
            # What an operation was given is not its making, also where its result is a view of it.
            leaves = tree_leaves((args, kwargs))
            given = {x.untyped_storage()._cdata for x in leaves if isinstance(x, Tensor)}
            for storage in made:
                if storage._cdata not in given:
                    self._see(storage)
        return result

    def _see(self, storage: Any) -> None:
        if storage in self._seen:  # of two results
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.now -= size

    def restart(self) -> int:
        """Begins a new peak; returns what lives now."""
        self.peak = self.now
        return self.now


@dataclass(frozen=True)
class Sizes:
    """What a stage's memory depends on, besides the model itself.

    Args:
        stage: "policy", "preference" (pairs) or "supervised".
        quantization, dtype: of the backbone.
        mixed: bf16-mixed precision.
        lora: of every role; None trains the whole model (supervised stage alone).
        frozen: how many frozen adapters are read beside the trained one.
        shared_heads: value heads on the policy's own states.
        critics: trained critic adapters beside the policy.
        prompt, response: tokens of the longest sequence.
        rows: sequences that share a forward and backward pass.
        batch: sequences whose activations live until one backward pass (no policy: all of a batch).
        accumulated: batches add up to one step, so that a batch's gradient is made beside others'.
        score_rows: sequences that are scored together.
        rollout_rows: sequences that are generated together.
        test_rows: the same outside of training, without mixed precision; 0: none are.
        unpacked: whether 4-bit weights are unpacked for as long as a rollout lasts.
        merged: adapters are added into copies of the weights for reading (float32 on a CPU).
        checkpointing: gradient checkpointing.
        optimizer: "adamw", "adamw_8bit" or "paged_adamw_8bit".
    """

    stage: Literal["policy", "preference", "supervised"]
    quantization: Literal["none", "nf4"]
    dtype: Literal["float32", "bfloat16"]
    mixed: bool
    lora: LoraOptions | None
    prompt: int
    response: int
    rows: int
    batch: int = 1
    accumulated: bool = False
    score_rows: int = 0
    rollout_rows: int = 0
    test_rows: int = 0
    frozen: int = 0
    shared_heads: int = 0
    critics: int = 0
    merged: bool = False
    unpacked: bool = False
    checkpointing: bool = False
    optimizer: str = "adamw"

    @property
    def width(self) -> int:
        return self.prompt + self.response

    @property
    def passes_add_up(self) -> bool:
        """Whether a backward pass is made beside the gradients of others."""
        return self.stage == "policy" or self.accumulated


@dataclass(frozen=True)
class Footprint:
    """Bytes of the parts that stay, and the peak of each phase, the parts included.

    Attributes:
        working: of each phase, what it needs beside the parts. cache: of a rollout's working bytes
            those of the KV cache when it is full. logits: the most that a pass holds at a time.
    """

    parameters: int
    trained: int
    parts: dict[str, int]
    phases: dict[str, int]
    working: dict[str, int]
    cache: int
    logits: int

    @property
    def peak(self) -> int:
        return max(self.phases.values())


class _Unpacked(torch.autograd.Function):
    """x Wᵀ with W unpacked for the forward pass, and once more for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        return nn.functional.linear(x, x.new_empty(shape))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return gradient @ gradient.new_empty(ctx.shape), None, None


class AdaptedLinear(nn.Module):
    """A linear layer, 4-bit or not, with LoRA adapters of which one or several are read."""

    def __init__(self, layer: nn.Linear, sizes: Sizes, adapted: bool, device: Device) -> None:
        super().__init__()
        shape = (layer.out_features, layer.in_features)
        self.shape, self.on_gpu = shape, device == "cuda"
        self.compute = torch.bfloat16 if self.on_gpu else torch.float32  # of 4-bit products
        self.quantized = sizes.quantization == "nf4"
        if self.quantized:
            count = shape[0] * shape[1]
            scales = -(-count // BLOCK)
            self.packed = nn.Parameter(torch.empty(-(-count // 2), dtype=torch.uint8), False)
            self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8))
            self.register_buffer("nested", torch.empty(-(-scales // NESTED_BLOCK)))
        else:
            self.weight = layer.weight
        self.bias = layer.bias
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        if adapted:
            assert sizes.lora is not None
            trained = 1 + sizes.critics
            for role in range(trained + sizes.frozen):
                down = torch.empty(sizes.lora.r, shape[1])
                up = torch.empty(shape[0], sizes.lora.r)
                self.down.append(nn.Parameter(down, role < trained))
                self.up.append(nn.Parameter(up, role < trained))
        self.active: Sequence[int] = ()
        self.unpacked: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        result = self._base(x)
        if not len(self.down) or not self.active:
            return result
        if len(self.active) > 1:
            # Each role's rows are adapted and added in place.
            for role, rows in zip(self.active, x.chunk(len(self.active)), strict=True):
                change = self._change(rows.clone(), role, result.dtype)
                part = rows.shape[0] * self.active.index(role)
                result[part : part + rows.shape[0]] += change
            return result
        return result + self._change(x, self.active[0], result.dtype)

    def _base(self, x: Tensor) -> Tensor:
        if not self.quantized:
            return nn.functional.linear(x, self.weight, self.bias)
        if self.unpacked is not None:
            own = nn.functional.linear(x.to(self.compute), self.unpacked, self.bias)
            return own.to(x.dtype).clone()
        result = _Unpacked.apply(x.to(self.compute), self.packed, self.shape)
        if self.bias is not None:
            result = result + self.bias.to(self.compute)
        return result.to(x.dtype).clone()

    def _change(self, x: Tensor, role: int, dtype: torch.dtype) -> Tensor:
        # PEFT widens what a LoRA layer is given; on 4 bits it does not under autocast, by which it
        # means CUDA's alone.
        if not (self.quantized and self.on_gpu and torch.is_autocast_enabled("cpu")):
            x = x.to(self.down[role].dtype)
        low = nn.functional.linear(x, self.down[role])
        return (nn.functional.linear(low, self.up[role]) * 2.0).to(dtype)


class _Model:
    """A causal language model without memory, whose last hidden states are its output."""

    def __init__(self, config: Any, sizes: Sizes, device: Device) -> None:
        from transformers import AutoModelForCausalLM

        self.sizes = sizes
        self.model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, sizes.dtype), attn_implementation="sdpa"
        )
        self.output = self.model.get_output_embeddings()
        self.model.set_output_embeddings(nn.Identity())
        full = sizes.lora is None
        self.model.requires_grad_(full)
        self.output.requires_grad_(full)
        self.layers: list[AdaptedLinear] = []
        if not full:
            self._adapt(device)
        if sizes.checkpointing:
            # No random numbers are drawn, and those of such tensors have no state to keep.
            options = {"use_reentrant": False, "preserve_rng_state": False}
            self.model.gradient_checkpointing_enable(options)
        count = 1 if sizes.stage == "preference" else sizes.shared_heads + sizes.critics
        self.heads = [nn.Linear(config.hidden_size, 1) for _ in range(count)]

    def _adapt(self, device: Device) -> None:
        lora = self.sizes.lora
        assert lora is not None
        chosen = lora.target_modules
        for path, parent in list(self.model.named_modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear and child is not self.output:
                    adapted = is_target(f"{path}.{name}".lstrip("."), chosen)
                    layer = AdaptedLinear(child, self.sizes, adapted, device)
                    setattr(parent, name, layer)
                    self.layers.append(layer)
        if not any(len(layer.down) for layer in self.layers):
            raise InputError(
                f"LoRA's target_modules {chosen} name no linear layer of this model; expected some "
                'of them, or "all-linear"'
            )

    def use(self, *roles: int) -> None:
        """Which adapters the next passes read; several: side by side, rows for each."""
        for layer in self.layers:
            layer.active = roles

    @contextmanager
    def reading(self, roles: int = 1, rollout: bool = False) -> Iterator[int]:
        """Evaluation of that many roles at once; yields how many share a pass."""
        self.model.eval()
        merged = self.sizes.merged
        self.use(*([] if merged else range(roles)))
        copies = [torch.empty_like(x.weight) for x in self.layers if merged and len(x.down)]
        unpack = rollout and self.sizes.unpacked
        packed = [layer for layer in self.layers if unpack and layer.quantized]
        for layer in packed:
            layer.unpacked = torch.empty(layer.shape, dtype=layer.compute)
        with torch.no_grad(), _autocast(self.sizes):
            yield 1 if merged else roles
        for layer in packed:
            layer.unpacked = None
        del copies

    def hidden(self, rows: int, width: int, **options: Any) -> Tensor:
        ids = torch.zeros((rows, width), dtype=torch.long)
        states: Tensor = self.model(input_ids=ids, use_cache=False, **options).logits
        return states

    def log_probs(self, hidden: Tensor, prompt: int) -> Tensor:
        """As `Backbone.log_probs`, with every response of full length: (N,)."""
        states = hidden[:, prompt - 1 : -1].flatten(0, 1)
        targets = torch.zeros(len(states), dtype=torch.long)
        chunk = token_chunk(self.output.weight.shape[0])
        parts = [
            token_log_probs(self.output, s, t)
            for s, t in zip(states.split(chunk), targets.split(chunk), strict=True)
        ]
        return torch.cat(parts)

    def parameters(self) -> list[nn.Parameter]:
        return [*self.model.parameters(), *self.output.parameters()]


def footprint(config: Any, sizes: Sizes, device: Device = "cuda") -> Footprint:
    """What a stage takes with a model of this configuration.

    Layers that are all alike add alike: a deep model is foretold from FEW and MANY of its layers,
    unless LoRA names some of them by number.

    Args:
        config: of transformers, as `AutoConfig` reads it.
        device: where it will run; 4-bit products are made in float32 on a CPU.
    """
    depth = config.num_hidden_layers
    kinds = set(getattr(config, "layer_types", None) or ["alike"])
    numbered = sizes.lora is not None and re.search(r"\b\d", str(sizes.lora.target_modules))
    if depth <= 2 * MANY or len(kinds) > 1 or numbered:
        return _joined(_footprint(config, sizes, device))
    few, many = (_footprint(_shallow(config, n), sizes, device) for n in (FEW, MANY))

    def deep(a: int, b: int) -> int:
        return round(a + (b - a) * (depth - FEW) / (MANY - FEW))

    def each(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
        return {name: deep(a[name], b[name]) for name in a}

    return _joined(
        Footprint(
            deep(few.parameters, many.parameters),
            deep(few.trained, many.trained),
            each(few.parts, many.parts),
            each(few.phases, many.phases),
            each(few.working, many.working),
            deep(few.cache, many.cache),
            many.logits,
        )
    )


def _joined(found: Footprint) -> Footprint:
    """Both steps of a rollout as one phase: the larger one, which the depth may have changed."""

    def join(bytes_: dict[str, int]) -> dict[str, int]:
        joined: dict[str, int] = {}
        for name, count in bytes_.items():
            phase = name.partition(",")[0]
            joined[phase] = max(count, joined.get(phase, 0))
        return joined

    return replace(found, phases=join(found.phases), working=join(found.working))


def _shallow(config: Any, layers: int) -> Any:
    """The configuration with fewer layers."""
    result = copy.deepcopy(config)
    if getattr(result, "layer_types", None):
        result.layer_types = result.layer_types[:layers]
    result.num_hidden_layers = layers
    return result


def _footprint(config: Any, sizes: Sizes, device: Device) -> Footprint:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
            return _measured(_Model(config, sizes, device), live)


def _measured(model: _Model, live: LiveBytes) -> Footprint:
    sizes = model.sizes
    gc.collect()  # what was replaced by packed weights
    adapters = [p for layer in model.layers for p in (*layer.down, *layer.up)]
    heads = [p for head in model.heads for p in head.parameters()]
    trained = [p for p in {id(p): p for p in model.parameters()}.values() if p.requires_grad]
    count = sum(p.numel() for p in trained) + sum(p.numel() for p in heads)
    parts = {
        "backbone": live.now - _bytes([*adapters, *heads]),
        "adapters": _bytes([*adapters, *heads]),
        "optimizer": round(count * STATE_BYTES[sizes.optimizer]),
    }
    resident = live.now + parts["optimizer"]
    working: dict[str, int] = {}
    cache = 0
    if sizes.stage == "policy":
        cache = _rollout("rollout", model, working, live)
        with _phase("score", working, live):
            _score(model)
    with _phase("update", working, live):
        _update(model, trained)
    gradients = sum(p.numel() * 4 for p in trained)
    # One temporary per weight: PyTorch's AdamW works on all of them together.
    working["step"] = gradients + round(count * 4 * (sizes.optimizer == "adamw"))
    if sizes.test_rows:
        # Callbacks have no mixed precision: the safety test answers as the policy will be used.
        model.sizes = replace(sizes, mixed=False, rollout_rows=sizes.test_rows)
        _rollout("test", model, working, live)
    names = {name: resident + bytes_ for name, bytes_ in working.items()}
    vocabulary = model.output.weight.shape[0]
    logits = 4 * vocabulary * min(token_chunk(vocabulary), sizes.rows * sizes.response)
    return Footprint(_parameters(model), count, parts, names, working, cache, logits)


def _parameters(model: _Model) -> int:
    """Weights of the backbone, packed ones counted as what they stand for."""
    own = {id(p): p.numel() for p in model.parameters()}
    for layer in model.layers:
        for p in (*layer.down, *layer.up):
            own.pop(id(p), None)
        if layer.quantized:
            own[id(layer.packed)] = layer.shape[0] * layer.shape[1]
    return sum(own.values())


def _bytes(parameters: Sequence[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


@contextmanager
def _phase(name: str, working: dict[str, int], live: LiveBytes) -> Iterator[None]:
    before = live.restart()
    yield
    working[name] = live.peak - before


def _autocast(sizes: Sizes) -> Any:
    """As Lightning does it: a weight is cast for each use, and no copy of it is kept."""
    return torch.autocast("cpu", torch.bfloat16, enabled=sizes.mixed, cache_enabled=False)


def _rollout(name: str, model: _Model, working: dict[str, int], live: LiveBytes) -> int:
    """Both steps of a rollout; bytes of the full cache."""
    first, last = (f"{name}, {step}" for step in STEPS)
    with _phase(first, working, live):
        kinds = _first_token(model)
    with _phase(last, working, live):
        return _last_token(model, kinds)


def _first_token(model: _Model) -> list[_Kind]:
    """All prompts at once, into an empty cache; what each of its layers is made of."""
    from transformers import DynamicCache

    sizes = model.sizes
    with model.reading(rollout=True):
        cache = DynamicCache(config=model.model.config)
        _next_token(model, cache, sizes.rollout_rows, sizes.prompt, sizes.prompt)
        pairs: list[Any] = [(x.keys, x.values) for x in cast(Any, cache.layers)]
        return [(k.shape[1], k.shape[-1], v.shape[-1], k.dtype) for k, v in pairs]


def _last_token(model: _Model, kinds: Sequence[_Kind]) -> int:
    """One token of each response, when the cache is full; its bytes."""
    from transformers import DynamicCache

    sizes = model.sizes
    rows, before = sizes.rollout_rows, sizes.width - 2
    with model.reading(rollout=True):
        cache = DynamicCache(config=model.model.config)
        for i, (heads, width, value_width, dtype) in enumerate(kinds):
            keys = torch.empty((rows, heads, before, width), dtype=dtype)
            cache.update(keys, torch.empty((rows, heads, before, value_width), dtype=dtype), i)
        del keys
        _next_token(model, cache, rows, 1, before + 1)
        layers = cast(Any, cache.layers)
        return sum(x.numel() * x.element_size() for y in layers for x in (y.keys, y.values))


def _next_token(model: _Model, cache: Any, rows: int, width: int, known: int) -> None:
    output = model.model(
        input_ids=torch.zeros((rows, width), dtype=torch.long),
        attention_mask=torch.ones((rows, known), dtype=torch.long),
        position_ids=torch.zeros((rows, width), dtype=torch.long),
        past_key_values=cache,
        use_cache=True,
    )
    draw(model.output(output.logits[:, -1]).float() / 1.0, torch.zeros(rows, dtype=torch.double))


def _score(model: _Model) -> None:
    """All roles of a group of responses in one pass: policy, reference, reward and cost."""
    sizes = model.sizes
    with model.reading(1 + sizes.critics + sizes.frozen) as together:
        hidden = model.hidden(together * sizes.score_rows, sizes.width).chunk(together)
        model.log_probs(hidden[0], sizes.prompt)


def _update(model: _Model, trained: Sequence[nn.Parameter]) -> None:
    """A batch's backward passes, one after the other, each trained role's own."""
    sizes = model.sizes
    model.model.train()
    if sizes.passes_add_up:
        for p in trained:
            p.grad = torch.empty_like(p)  # of the batches before
    for role in range(1 + sizes.critics):
        model.use(role)
        if sizes.stage == "policy":
            loss = _batch_loss(model, role)
        else:
            loss = known_gradient(partial(_batch_loss, model, role), trained)
        loss.backward()
        del loss
    for p in trained:
        p.grad = None


def _batch_loss(model: _Model, role: int) -> Tensor:
    sizes = model.sizes
    with _autocast(sizes):
        states = [model.hidden(sizes.rows, sizes.width) for _ in range(sizes.batch)]
        return torch.stack([_loss(model, hidden, role) for hidden in states]).sum()


def _loss(model: _Model, hidden: Tensor, role: int) -> Tensor:
    heads, shared = model.heads, model.sizes.shared_heads
    if model.sizes.stage == "preference":
        score: Tensor = nn.functional.linear(hidden[:, -1].float(), heads[0].weight)
        return score.sum()
    loss = hidden.new_zeros((), dtype=torch.float32)
    if role == 0:
        loss = model.log_probs(hidden, model.sizes.prompt).sum()
    states = hidden[:, model.sizes.prompt - 1 : -1]
    for head in heads[:shared] if role == 0 else heads[shared + role - 1 : shared + role]:
        loss = loss + nn.functional.linear(states.float(), head.weight).sum()
    return loss
