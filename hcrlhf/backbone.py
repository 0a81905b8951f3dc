"""One frozen, possibly 4-bit, backbone; a LoRA adapter per role; small float32 score heads.

Roles are entered through `Backbone.role(name)` and nowhere else: PEFT's own switches change which
weights are trainable, and gradient checkpointing recomputes with whatever adapter is active at
backward, so forward and backward of a role belong inside one `with` block.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hcrlhf.errors import InputError
from hcrlhf.stages import BackboneSource
from hcrlhf.text import Tokens, one_line

# The backbone without any adapter.
BASE = "__base__"
HEAD_FILE = "head.safetensors"
LOGITS = 2**24
ADAPTER_FILE = "adapter_model.safetensors"
LORA_KEYS = (".lora_A.weight", ".lora_B.weight")
SCALE_SETTINGS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
# Of PEFT's LoraConfig: what leaves an adapter W + scale · B A, whatever its value.
PLAIN_SETTINGS = {
    *SCALE_SETTINGS,
    *("lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "task_type", "auto_mapping", "peft_type", "peft_version"),
    *("inference_mode", "fan_in_fan_out", "base_model_name_or_path", "revision"),
}
ONLY_PLAIN = (
    "expected plain LoRA, which adds B A to linear layers and nothing else; merge it into its "
    "model and give that"
)


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters (Hu et al., arXiv 2106.09685): W + (alpha / r) B A.

    Args:
        r: rank. alpha: scale.
        target_modules: names of the linear layers, or "all-linear".
    """

    r: int = 8
    alpha: int = 16
    target_modules: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise InputError(f"the LoRA rank r is a whole number >= 1, got {self.r}")

    def config(self) -> Any:
        from peft import LoraConfig

        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=0.0,  # dropout would make the ratio of the first PPO step differ from 1
            target_modules=self.target_modules,
            task_type="CAUSAL_LM",
        )


def load_causal_lm(
    source: BackboneSource, device: torch.device | None = None, dropout: bool = True
) -> Any:
    """The Hugging Face causal language model that `source` names, frozen or not as it comes.

    Args:
        dropout: False takes out what its config has of it (GPT-2 and OPT: 0.1).

    Raises:
        InputError: it cannot be read, or 4-bit is asked for without bitsandbytes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": getattr(torch, source.dtype)}
    if source.quantization == "nf4":
        on_gpu = device is not None and device.type == "cuda"
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if on_gpu else torch.float32,
        )
        options["device_map"] = {"": device or torch.device("cpu")}
    try:
        if not dropout:
            options["config"] = without_dropout(AutoConfig.from_pretrained(source.folder))
        model = AutoModelForCausalLM.from_pretrained(source.folder, **options)
    except ImportError as error:
        raise InputError(
            f"quantization nf4 needs bitsandbytes ({one_line(error)}); pip install bitsandbytes, "
            "or set quantization: none"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"the model {source.model!r} cannot be loaded ({one_line(error)}); expected a Hugging "
            "Face causal language model folder or hub id"
        ) from error
    for module in cast(Any, model).modules():
        # On some CPUs bitsandbytes repacks 4-bit weights at the first evaluation, for a kernel in
        # bfloat16 that knows no gradient: scoring would differ from training, and training break.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def without_dropout(config: Any) -> Any:
    """The config with every rate of dropout at 0: dropout, attn_pdrop, layerdrop and the like."""
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


class Backbone(nn.Module):
    """A causal language model whose last hidden states, log-probabilities and scores are read.

    Args:
        causal_lm: a Hugging Face causal language model; its output layer is kept apart, so that
            a forward pass ends at the hidden states and no (B, T, V) tensor is made unasked.
        quantized: whether its linear layers are 4-bit.
    """

    def __init__(self, causal_lm: Any, quantized: bool = False, full: bool = False) -> None:
        super().__init__()
        for key in ("final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling"):
            value = getattr(causal_lm.config.get_text_config(), key, None)
            if value not in (None, 1.0):
                raise InputError(
                    f"{causal_lm.config.model_type} rescales its logits ({key} = {value}), which "
                    "this backbone does not reproduce; use a model that does not, such as Llama or "
                    "Qwen"
                )
        self.output_layer = causal_lm.get_output_embeddings()
        # With the identity as output layer, the model's `.logits` are its last hidden states.
        causal_lm.set_output_embeddings(nn.Identity())
        causal_lm.requires_grad_(full)
        self.output_layer.requires_grad_(full)
        self.model: Any = causal_lm
        self.quantized = quantized
        self.full = full
        self.hidden_size: int = causal_lm.config.hidden_size
        self.heads = nn.ModuleDict()
        self.roles: list[str] = []
        self._trainable_roles: set[str] = set()
        self._trainable_heads: set[str] = set()
        self._active = BASE

    # -- roles ---------------------------------------------------------------------------------

    def add_role(self, name: str, lora: LoraOptions | None = None, *, trainable: bool) -> None:
        """A new adapter whose output starts at zero (LoRA's B = 0)."""
        config = (lora or LoraOptions()).config()
        self._add(name, config)
        self._finish_role(name, trainable)

    def load_role(self, name: str, folder: str | Path, *, trainable: bool) -> None:
        """The adapter that a stage left in `folder`.

        Raises:
            InputError: it is not plain LoRA, or does not fit this backbone.
        """
        from peft import PeftConfig, set_peft_model_state_dict

        config = PeftConfig.from_pretrained(str(folder))
        _require_plain_lora(config, folder)
        config.inference_mode = False
        config.base_model_name_or_path = None  # `hcrlhf.json` names the base, by its fingerprint
        state = safetensors.torch.load_file(Path(folder) / ADAPTER_FILE)
        if others := [key for key in state if not key.endswith(LORA_KEYS)]:
            raise InputError(f"the adapter in {folder} holds {others[0]}; {ONLY_PLAIN}")
        self._add(name, config)
        try:
            result: Any = set_peft_model_state_dict(self.model, state, adapter_name=name)
        except RuntimeError as error:
            raise InputError(
                f"the adapter in {folder} does not fit this backbone ({one_line(error)})"
            ) from error
        if result.unexpected_keys or len(state) != len(self.adapter_state(name)):
            raise InputError(f"the adapter in {folder} belongs to another kind of backbone")
        self._finish_role(name, trainable)

    def copy_role(self, name: str, source: str, *, trainable: bool) -> None:
        """A new adapter that starts as a copy of the role `source`."""
        self._add(name, copy.deepcopy(self.model.peft_config[source]))
        self.set_adapter_state(name, self.adapter_state(source))
        self._finish_role(name, trainable)

    def drop_role(self, name: str) -> None:
        """Removes an adapter and the head of the same name."""
        self.roles.remove(name)
        self._activate(self.roles[0])
        self.model.delete_adapter(name)
        self._trainable_roles.discard(name)
        if name in self.heads:
            del self.heads[name]
            self._trainable_heads.discard(name)
        self.restore_trainable()

    def _add(self, name: str, config: Any) -> None:
        from peft import get_peft_model

        with warnings.catch_warnings():
            # PEFT cannot know that the output layer is kept apart on purpose.
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            try:
                if not self.roles:
                    self.model = get_peft_model(self.model, config, adapter_name=name)
                else:
                    self.model.add_adapter(name, config)
            except ValueError as error:
                raise InputError(
                    f"LoRA does not fit this model ({one_line(error)}); expected target_modules to "
                    'name its linear layers, or "all-linear"'
                ) from error
        # PEFT adapts these too, but they would be left out where several roles are read at once.
        other = [
            n for n, m in self.model.named_modules() if name in getattr(m, "lora_embedding_A", ())
        ]
        if other:
            raise InputError(
                f"LoRA on {other[0].rpartition('.')[2]} is not supported, which is an embedding; "
                'expected target_modules to name linear layers, or "all-linear"'
            )
        self.roles.append(name)

    def _finish_role(self, name: str, trainable: bool) -> None:
        if trainable:
            self._trainable_roles.add(name)
        for parameter_name, parameter in self.model.named_parameters():
            if f".{name}." in parameter_name:
                parameter.data = parameter.data.float()
        self._activate(name)
        self.restore_trainable()

    def add_head(
        self, name: str, *, trainable: bool, state: dict[str, Tensor] | None = None
    ) -> None:
        """A float32 linear head on the hidden state; zero at first, or with the given weights."""
        head = nn.Linear(self.hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        if state is not None:
            head.load_state_dict(state)
        self.heads[name] = head.requires_grad_(trainable)
        if trainable:
            self._trainable_heads.add(name)

    def set_head_bias(self, name: str, value: float) -> None:
        nn.init.constant_(cast(nn.Linear, self.heads[name]).bias, value)

    def _activate(self, name: str) -> None:
        if name != self._active and name != BASE:
            self.model.set_adapter(name, inference_mode=name not in self._trainable_roles)
            self._active = name

    def restore_trainable(self) -> None:
        """Makes exactly the adapters of trainable roles trainable, whatever PEFT left behind."""
        trained = {id(p) for _, p in self.trained_parameters()}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in trained)

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that training may change: adapters of trainable roles, heads."""
        for name, parameter in self.named_parameters():
            parts = name.split(".")
            if parts[0] == "heads":
                trained = parts[1] in self._trainable_heads
            else:
                lora = any(part.startswith("lora_") for part in parts)
                trained = self.full or (lora and not self._trainable_roles.isdisjoint(parts))
            if trained:
                yield name, parameter

    @contextmanager
    def role(self, name: str) -> Iterator[None]:
        """Everything inside runs with the adapter `name` (BASE: without any)."""
        if not self.roles:
            if name != BASE:
                raise KeyError(f"no role {name!r} on this backbone")
            yield
        elif name == BASE:
            try:
                with self.model.disable_adapter():
                    yield
            finally:
                self.restore_trainable()
        else:
            outer = self._active  # given back at the end, so that roles may be nested
            self._activate(name)
            try:
                yield
            finally:
                if outer in self.roles and self._active != outer:
                    self._activate(outer)

    @property
    def mergeable(self) -> bool:
        """Whether `merged` may add an adapter into the weights: float32 ones in main memory alone.

        4-bit weights, and bfloat16 ones, would be rounded anew and be another policy; on a GPU the
        copy of the backbone costs what LoRA saves.
        """
        weight = next(self.model.parameters())
        in_memory = weight.dtype == torch.float32 and weight.device.type == "cpu"
        return in_memory and not (self.quantized or self.full)

    @contextmanager
    def merged(self, name: str) -> Iterator[None]:
        """As `role`, without gradients and faster: W + (alpha / r) B A takes the place of W.

        The adapter's own tensors and W are the same ones again afterwards, bit for bit.
        """
        trained = {id(p) for p in self.parameters() if p.requires_grad}
        merge = name != BASE and bool(self.roles) and self.mergeable
        kept: list[tuple[nn.Parameter, Tensor]] = []
        try:
            if merge:
                kept.extend(self._merge(name))
            with self.role(BASE if merge else name):
                yield
        finally:
            for weight, data in kept:
                weight.data = data
            # `role` leaves every trainable role trainable; inside another role that is not so.
            for parameter in self.parameters():
                parameter.requires_grad_(id(parameter) in trained)

    def _merge(self, name: str) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Adds an adapter into the weights; yields each weight and what it held."""
        from peft.tuners.lora import LoraLayer

        for layer in self.model.modules():
            if isinstance(layer, LoraLayer) and name in layer.lora_A:
                weight = cast(Any, layer).get_base_layer().weight
                data = weight.data
                weight.data = data + cast(Any, layer).get_delta_weight(name).detach()
                yield weight, data

    @contextmanager
    def unpacked(self) -> Iterator[None]:
        """4-bit layers multiply by copies of their weights, unpacked once and not in every pass.

        A copy holds the same values in the dtype of the products (2 bytes a weight in bfloat16), so
        that results differ by rounding at most. For passes without gradients; nothing happens where
        no layer is packed.
        """
        if not self.quantized:
            yield
            return
        from bitsandbytes.nn import Linear4bit

        layers: list[Any] = [m for m in self.model.modules() if isinstance(m, Linear4bit)]
        kept = [layer.__dict__.get("forward") for layer in layers]
        try:
            for layer in layers:
                layer.forward = _unpacked_product(layer)
            yield
        finally:
            for layer, forward in zip(layers, kept, strict=True):
                layer.__dict__.pop("forward", None)  # none where memory ran out before its turn
                if forward is not None:  # a hook's
                    layer.forward = forward

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Evaluation mode without gradients, and back. Several roles and a KV cache need it."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(training)

    # -- forward -------------------------------------------------------------------------------

    def hidden(self, tokens: Tokens) -> Tensor:
        """Last hidden states (B, P + T, H) of the active role; what padding holds has no meaning.

        The model reads every sequence from its first column on. So positions count from the first
        real token, attention needs no mask but causality, and the width is that of the longest
        sequence and not of the longest prompt and the longest response together.
        """
        start = tokens.attention_mask.int().argmax(dim=1, keepdim=True)
        columns = torch.arange(tokens.input_ids.shape[1], device=start.device)
        width = int(tokens.lengths.max())
        moved = tokens.input_ids.gather(1, (start + columns[:width]).clamp(max=columns[-1]))
        output = self.model(input_ids=moved, use_cache=False)
        states = cast(Tensor, output.logits)
        back = (columns - start).clamp(0, width - 1)
        return states.gather(1, back[..., None].expand(-1, -1, states.shape[-1]))

    def log_probs(self, hidden: Tensor, tokens: Tokens, temperature: float = 1.0) -> Tensor:
        """log π(y_t | x, y_<t) of the response tokens, (B, T) float32, zero outside the mask.

        Only response tokens go through the output layer, `token_chunk` of them at a time, and no
        chunk's logits outlive it: a frozen output layer gives its gradient in the forward pass, one
        that is trained is run again in the backward pass.
        """
        chunk = token_chunk(self.output_layer.weight.shape[0])
        mask = tokens.response_mask
        states = self._before_response(hidden, tokens)[mask]
        targets = tokens.response_ids[mask]
        parts = [
            token_log_probs(self.output_layer, s, t, temperature)
            for s, t in zip(states.split(chunk), targets.split(chunk), strict=True)
        ]
        result = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        return result.masked_scatter(mask, torch.cat(parts))

    def values(self, head: str, hidden: Tensor, tokens: Tokens) -> Tensor:
        """V of the state before each response token: (B, T) float32, zero outside the mask."""
        states = self._before_response(hidden, tokens)
        return self._head(head, states) * tokens.response_mask

    def scores(self, head: str, hidden: Tensor, tokens: Tokens) -> Tensor:
        """The head at the last real token of each row: (B,) float32.

        The last token goes by the attention mask; an empty response is scored at its prompt.
        """
        columns = torch.arange(hidden.shape[1], device=hidden.device)
        last = (columns * tokens.attention_mask).argmax(dim=1)
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        return self._head(head, hidden[rows, last])

    def _head(self, name: str, states: Tensor) -> Tensor:
        # Outside autocast: a score in bfloat16 has three digits.
        with torch.autocast(states.device.type, enabled=False):
            output: Tensor = self.heads[name](states.float())[..., 0]
        return output

    @staticmethod
    def _before_response(hidden: Tensor, tokens: Tokens) -> Tensor:
        """Hidden states (B, T, H) from which each response token is predicted."""
        start = tokens.prompt_length - 1
        return hidden[:, start : start + tokens.response_ids.shape[1]]

    def hidden_of_roles(self, tokens: Tokens, roles: Sequence[str]) -> list[Tensor]:
        """Hidden states (B, P + T, H) of several frozen roles, in one forward pass of R·B rows.

        Only inside `inference()`.
        """
        self._require_evaluation()
        copies = len(roles)
        stacked = Tokens(
            tokens.input_ids.repeat(copies, 1),
            tokens.attention_mask.repeat(copies, 1),
            tokens.prompt_length,
            tokens.truncated.repeat(copies),
        )
        with self._adapters_by_block(roles):
            return list(self.hidden(stacked).chunk(copies))

    @contextmanager
    def _adapters_by_block(self, roles: Sequence[str]) -> Iterator[None]:
        """Rows in equal blocks, one per role: to W x of a block its role's (α / r) B A x is added.

        PEFT would mix adapters too, but by the numbers of their rows: lists that every layer sends
        to the device a dozen times, and that stay in its layers when a pass fails.
        """
        from peft.tuners.lora import LoraLayer

        def add(layer: Any, given: tuple[Tensor, ...], output: Tensor) -> None:
            blocks = (given[0].chunk(len(roles)), output.chunk(len(roles)))
            for role, x, y in zip(roles, *blocks, strict=True):
                if role in layer.lora_A:
                    x = x if torch.is_autocast_enabled(x.device.type) else x.float()
                    y += layer.lora_B[role](layer.lora_A[role](x)) * layer.scaling[role]

        trained = {id(p) for p in self.parameters() if p.requires_grad}
        hooks: list[Any] = []
        try:
            with self.role(BASE):
                for layer in self.model.modules():
                    if isinstance(layer, LoraLayer):
                        hooks.append(cast(nn.Module, layer).register_forward_hook(add))
                yield
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in self.parameters():  # as in `merged`
                parameter.requires_grad_(id(parameter) in trained)

    def _require_evaluation(self) -> None:
        if self.training:
            raise ValueError(
                "several roles are read in evaluation mode alone, not in training mode"
            )

    def read(
        self, parts: Sequence[Tokens], readers: Mapping[str, Callable[[Tensor, Tokens], Tensor]]
    ) -> dict[str, list[Tensor]]:
        """What each role's reader makes of its hidden states (B, P + T, H), part by part.

        Only inside `inference()`. Where adapters can be merged, a role at a time: that is less
        work. Otherwise all roles of a part in one pass, which reads (and dequantises) the backbone
        once.
        """
        if self.roles and not self.mergeable:
            found: dict[str, list[Tensor]] = {role: [] for role in readers}
            for part in parts:
                states = self.hidden_of_roles(part, list(readers))
                for (role, reader), hidden in zip(readers.items(), states, strict=True):
                    found[role].append(reader(hidden, part))
            return found
        self._require_evaluation()
        found = {}
        for role, reader in readers.items():
            with self.merged(role):
                found[role] = [reader(self.hidden(part), part) for part in parts]
        return found

    # -- weights on disk -----------------------------------------------------------------------

    def adapter_state(self, name: str) -> dict[str, Tensor]:
        """The adapter's weights under the names that `PeftModel.from_pretrained` expects."""
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(
            self.model, adapter_name=name, save_embedding_layers=False
        )
        return {key: value.detach() for key, value in sorted(state.items())}

    def set_adapter_state(self, name: str, state: dict[str, Tensor]) -> None:
        """The inverse of `adapter_state`; the tensors are copied."""
        from peft import set_peft_model_state_dict

        copies = {key: value.clone() for key, value in state.items()}
        set_peft_model_state_dict(self.model, copies, adapter_name=name)

    def adapter_bytes(self, name: str) -> bytes:
        """The adapter's safetensors file, as `save_role` writes it."""
        state = {key: value.cpu().contiguous() for key, value in self.adapter_state(name).items()}
        return safetensors.torch.save(state, metadata={"format": "pt"})

    def save_role(self, name: str, folder: Path, model: str, revision: str | None = None) -> None:
        """Writes the adapter in PEFT's own format; `model` is what it says it belongs to."""
        from peft import LoraConfig

        config = LoraConfig(**self.model.peft_config[name].to_dict())
        config.base_model_name_or_path, config.revision = model, revision
        config.inference_mode = True
        # A set, whose order changes from process to process: the same policy, the same bytes.
        if config.target_modules is not None and not isinstance(config.target_modules, str):
            config.target_modules = sorted(config.target_modules)
        config.save_pretrained(str(folder))
        (folder / ADAPTER_FILE).write_bytes(self.adapter_bytes(name))

    def scale_settings(self, name: str) -> dict[str, Any]:
        """Of an adapter's settings those that its tensors do not show: the scale of B A."""
        config = self.model.peft_config[name].to_dict()
        return {key: config[key] for key in SCALE_SETTINGS}

    def save_full(self, folder: Path) -> None:
        """Writes the whole model in Hugging Face form (after full supervised tuning)."""
        self.model.set_output_embeddings(self.output_layer)
        try:
            self.model.save_pretrained(str(folder))
        finally:
            self.model.set_output_embeddings(nn.Identity())

    def save_head(self, name: str, folder: Path) -> None:
        state = {key: value.detach().cpu() for key, value in self.heads[name].state_dict().items()}
        safetensors.torch.save_file(state, folder / HEAD_FILE)

    def trained_state(self) -> dict[str, Tensor]:
        """Every trained tensor under its parameter name; the frozen backbone is left out."""
        return {name: parameter.detach() for name, parameter in self.trained_parameters()}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `trained_state`.

        Raises:
            InputError: names or shapes differ: the state belongs to other roles, another LoRA rank
                or another backbone.
        """
        own = dict(self.trained_parameters())
        if own.keys() != state.keys():
            odd = sorted(own.keys() ^ state.keys())
            raise InputError(
                f"the checkpoint holds other weights than this config trains: {len(odd)} names "
                f"differ, {odd[0]} among them; resume with the config of the original run"
            )
        for name, parameter in own.items():
            if parameter.shape != state[name].shape:
                raise InputError(
                    f"the checkpoint's weights have other shapes than this config's: {name} is "
                    f"{list(state[name].shape)} there and {list(parameter.shape)} here; give the "
                    "lora of the original run"
                )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])


def token_chunk(vocabulary: int) -> int:
    """How many tokens go through the output layer together: LOGITS logits, 64 MiB in float32."""
    return max(1, LOGITS // vocabulary)


def _unpacked_product(layer: Any) -> Callable[[Tensor], Tensor]:
    """The forward pass of bitsandbytes' 4-bit linear layer, by an unpacked copy of its weight."""
    from bitsandbytes.functional import dequantize_4bit

    dtype = layer.compute_dtype or layer.weight.quant_state.dtype
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
    bias = None if layer.bias is None else layer.bias.to(dtype)

    def product(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # the dtype is the layer's
            return nn.functional.linear(x.to(dtype), weight, bias).to(x.dtype)

    return product


def _require_plain_lora(config: Any, folder: str | Path) -> None:
    """
    Raises:
        InputError: an adapter that is more than W + scale · B A: merged for sampling, or side by
            side with others, it would not be what its folder is elsewhere.
    """
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise InputError(f"the adapter in {folder} is {type(config).__name__}; {ONLY_PLAIN}")
    default = LoraConfig().to_dict()
    for name, value in config.to_dict().items():
        usual = not value or value == default.get(name) or name in PLAIN_SETTINGS
        if not usual and (name, value) != ("init_lora_weights", "gaussian"):
            raise InputError(f"the adapter in {folder} has {name}: {value}; {ONLY_PLAIN}")


def token_log_probs(
    layer: nn.Module, states: Tensor, targets: Tensor, temperature: float = 1.0
) -> Tensor:
    """Log-probabilities (N,) of the targets (N,) by an output layer on hidden states (N, H)."""
    if not torch.is_grad_enabled():
        return _log_probs_of(layer(states), targets, temperature)
    if type(layer) is nn.Linear and layer.bias is None and not layer.weight.requires_grad:
        result: Tensor = FrozenOutput.apply(states, layer.weight, targets, temperature)
        return result
    return cast(
        Tensor,
        checkpoint(
            lambda s: _log_probs_of(layer(s), targets, temperature),
            states,
            use_reentrant=False,
            preserve_rng_state=False,  # it draws nothing
        ),
    )


def _log_probs_of(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) at the targets: (N, V) and (N,) to (N,) float32."""
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    chosen = logits.gather(-1, targets[:, None])[:, 0]
    return chosen - logits.logsumexp(-1)


class FrozenOutput(torch.autograd.Function):
    """Log-probabilities of target tokens, (N,), from states (N, H) by a frozen layer (V, H).

    With z = W s / temperature and p = softmax(z), ∂ log p_y / ∂ s = Wᵀ(1_y - p) / temperature.
    That needs nothing from the backward pass but a factor per token, so it is formed at once and
    the (N, V) logits are gone when the forward pass is. 1_y - p is taken in float32: rounded to 16
    bits before, W_y and Wᵀp are the same for a token that the model is sure of.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, temperature: float
    ) -> Tensor:
        logits = nn.functional.linear(states, weight)
        result = _log_probs_of(logits, targets, temperature)
        excess = logits.float().div_(temperature).softmax(-1)
        excess[torch.arange(len(targets), device=excess.device), targets] -= 1
        slope = excess.to(weight) @ weight / -temperature
        ctx.save_for_backward(slope.to(states))
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * gradients[0][:, None].to(slope), None, None, None


def load_head(folder: str | Path) -> dict[str, Tensor]:
    """The head weights that a preference stage left in `folder`.

    Raises:
        InputError: there are none.
    """
    path = Path(folder) / HEAD_FILE
    if not path.is_file():
        raise InputError(f"{folder} holds no {HEAD_FILE}; run its stage again")
    return safetensors.torch.load_file(path)
