"""Rewards and costs from texts, by a model of its own or by a function.

A scorer sees the dialogue (without the policy's own system prompt and template) and the response
as text, and renders and tokenises them itself. Positive cost = harmful.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from hcrlhf.classifier import Classifier, Dtype, load_classifier
from hcrlhf.errors import InputError
from hcrlhf.examples import Message, user_turn
from hcrlhf.hashing import file_sha256, json_hash, sha256, source_file
from hcrlhf.preferences import check_squash, squash_range
from hcrlhf.samples import Floats
from hcrlhf.stages import ScoreMoments, fingerprint, read_classifier_stage, read_prompt_keys
from hcrlhf.text import one_line

Slot = Literal["reward", "cost"]
Dialogue = Sequence[Message]

# Two, so that a single number for a whole batch is noticed.
PROBE_PROMPTS = (user_turn("Hello, how are you?"), user_turn("Name a colour."))
PROBE_RESPONSES = ("Fine, thanks.", "Blue.")
HEX = frozenset("0123456789abcdef")


class Scorer(ABC):
    """One number per response; a subclass of your own needs `scores` alone.

    Args:
        mean, std: moments by which a reward is standardised; None measures them on the first
            rollout, whose responses are the reference's.
        squash: S of a cost: policy and safety test see c' = S tanh(c / S), which lies in [-S, S],
            so that an exact bound on its mean exists.
        lower, upper: the range that a cost keeps to by itself, in place of a squash. A score
            outside of it by rounding (1e-6 of its width) is taken for the end; any other ends
            the run.
    """

    mean: float | None = None
    std: float | None = None
    squash: float | None = None
    lower: float | None = None
    upper: float | None = None
    _init_args: Mapping[str, Any] = {}  # as given, for the plan of a safety test
    _opaque: Sequence[str] = ()  # those whose contents it could not name
    # Whether the zero of the score is known to mean nothing (trained without sign terms).
    arbitrary_zero = False

    def __init__(
        self,
        mean: float | None = None,
        std: float | None = None,
        squash: float | None = None,
        lower: float | None = None,
        upper: float | None = None,
    ) -> None:
        if (mean is None) != (std is None):
            raise InputError(f"mean and std of a scorer are given together, got {mean} and {std}")
        if std is not None and not 0 < std < float("inf"):
            raise InputError(f"std of a scorer is positive, got {std}")
        if squash is not None:
            check_squash(squash, "cost")
        self.mean, self.std, self.squash = mean, std, squash
        self.lower, self.upper = lower, upper
        self._check_range()

    def _check_range(self) -> None:
        lower, upper = self.lower, self.upper
        if (lower is None) != (upper is None) or (lower is not None and self.squash is not None):
            raise InputError(
                "a cost has a squash, or a range of its own by lower and upper together; got "
                f"lower {lower}, upper {upper} and squash {self.squash}"
            )
        if lower is not None and upper is not None and not -math.inf < lower < upper < math.inf:
            raise InputError(f"the range of a scorer is lower < upper, got [{lower}, {upper}]")

    def __new__(cls, *arguments: Any, **named: Any) -> Scorer:
        scorer = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind(scorer, *arguments, **named)
        except TypeError:  # for __init__ to refuse; or a copy, which brings them along
            return scorer
        bound.apply_defaults()
        given, opaque = {}, []
        for name, value in [*bound.arguments.items()][1:]:
            try:
                given[name] = plain(value)
            except TypeError:
                opaque.append(f"{name} is a {type(value).__name__}")
        scorer._init_args, scorer._opaque = given, opaque
        return scorer

    @abstractmethod
    def scores(self, prompts: Sequence[Dialogue], responses: Sequence[str]) -> Floats:
        """float64 scores (B,) of B dialogues, each ending with a user turn, and B responses.

        The same texts get the same score, whatever else is in the batch.
        """

    @property
    def name(self) -> str:
        """For messages."""
        return type(self).__name__

    @property
    def moments(self) -> ScoreMoments | None:
        if self.mean is None or self.std is None:
            return None
        return ScoreMoments(self.mean, self.std, 0)

    def to(self, device: torch.device) -> None:  # noqa: B027 (a scorer may have nothing to move)
        """Moves its weights, if it has any."""

    def prepare(self, slot: Slot) -> None:
        """Loads what it needs and scores two tiny examples, before any training.

        Raises:
            InputError: it is not for this slot, does not give two finite numbers, or gives others
                for each example alone.
        """
        if self.squash is not None:
            check_squash(self.squash, slot)
        self._check_range()  # a subclass may have set them itself
        if self.lower is not None and slot == "reward":
            raise InputError(f"{slot}: lower and upper of {self.name} are for a cost; remove them")
        if self.mean is not None and slot == "cost":
            raise InputError(
                f"{slot}: mean and std of {self.name} standardise a reward, and a cost stays in "
                "the units of its threshold; remove them"
            )
        try:
            scores = self.checked(PROBE_PROMPTS, PROBE_RESPONSES)
            self.require_range(scores)
            pairs = zip(PROBE_PROMPTS, PROBE_RESPONSES, strict=True)
            alone = np.concatenate([self.checked([prompt], [text]) for prompt, text in pairs])
        except RuntimeError as error:
            raise InputError(f"{slot}: {error}") from error
        if not np.isfinite(scores).all():
            raise InputError(
                f"{slot}: {self.name} gave {scores.tolist()} for two short responses; expected "
                "finite numbers"
            )
        # Half precision and padding move a score a little; what a batch is compared with moves all.
        width = 1.0 if self.lower is None or self.upper is None else self.upper - self.lower
        room = 0.05 * np.maximum(np.abs(scores), width)
        if not (np.abs(scores - alone) <= room).all():
            raise InputError(
                f"{slot}: {self.name} gave {scores.tolist()} for two short responses, but "
                f"{alone.tolist()} for each alone; a score may depend neither on what else is in "
                "the batch nor on chance, or the costs of a safety test are not independent"
            )
        if any(len(k) < 32 or set(k[:32]) - HEX for k in self.training_prompt_keys()):
            raise InputError(
                f"{slot}: training_prompt_keys of {self.name} gives something else than "
                "hcrlhf.examples.prompt_key of prompts"
            )
        if slot == "cost":
            self.provenance()  # refuses now what the plan of the safety test could not name

    def checked(
        self, prompts: Sequence[Dialogue], responses: Sequence[str], sealed: bool = False
    ) -> Floats:
        """`scores`, one float64 per response. What is not finite is for the caller to refuse.

        Args:
            sealed: nothing may be said of these texts, so of an error only its kind and its place.

        Raises:
            RuntimeError: it raised, or gave something else.
        """
        if not sealed:
            return self._checked(prompts, responses)
        try:
            return self._checked(prompts, responses)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            # The scorer's own error, unless it was never raised.
            cause = error.__cause__
            told = cause if cause is not None and cause.__traceback__ else error
            place = traceback.extract_tb(told.__traceback__)[-1]
            kind, where = type(told).__name__, f"{Path(place.filename).name}, line {place.lineno}"
        # Outside of the handler: the error, whose text may hold a prompt, is not shown with ours.
        raise RuntimeError(
            f"{self.name} could not score responses to safety prompts ({kind} in {where}); what it "
            "said is kept back, since it may hold a prompt or a response"
        )

    def _checked(self, prompts: Sequence[Dialogue], responses: Sequence[str]) -> Floats:
        try:
            # Of whoever asks neither autocast, which is on in a training step and off in a safety
            # test, nor gradients: what a response scores must not depend on the caller.
            off = partial(torch.autocast, enabled=False)
            with torch.no_grad(), off("cuda"), off("cpu"):
                scores = self.scores(prompts, responses)
        except InputError:
            raise
        except (Exception, SystemExit) as error:  # its exit would be taken for ours, and 0 for PASS
            raise RuntimeError(
                f"{self.name} raised {type(error).__name__}: {one_line(error)}"
            ) from error
        vector = one_per_response(scores, len(responses), self.name)
        if self.lower is None or self.upper is None:
            return vector
        rounding = 1e-6 * (self.upper - self.lower)
        near = (vector >= self.lower - rounding) & (vector <= self.upper + rounding)
        return np.where(near, vector.clip(self.lower, self.upper), vector)

    def require_range(self, scores: Floats) -> None:
        """
        Raises:
            RuntimeError: one of `checked` lies outside of the declared range; names it.
        """
        if self.lower is not None and self.upper is not None:
            outside = scores[(scores < self.lower) | (scores > self.upper)]
            if outside.size:
                raise RuntimeError(
                    f"{self.name} gave {outside[0]}, outside of the range "
                    f"[{self.lower}, {self.upper}] that it declares"
                )

    @property
    def cost_range(self) -> tuple[float, float] | None:
        """In which the costs lie that policy and safety test see; None where nothing says so."""
        if self.lower is not None and self.upper is not None:
            return self.lower, self.upper
        return squash_range(self.squash)

    @cached_property
    def _source(self) -> str:
        """SHA-256 of the file that defines it, when it was first asked for: before training."""
        return source_hash(type(self), self.name)

    def provenance(self) -> dict[str, Any]:
        """What the plan of a safety test commits to where this is the cost.

        Of its arguments a hash: plan and certificate are for others to read, and one of them may be
        the key of a service.

        Raises:
            InputError: an argument is an object whose contents no plan can name.
        """
        cls = type(self)
        if self._opaque:
            raise InputError(
                f"cost: {self.name} was given objects that the plan of a safety test cannot tell "
                f"from others of their kind ({', '.join(self._opaque)}); let it take texts, "
                "numbers, lists, paths, enums or dataclasses"
            )
        return {
            "class_path": f"{cls.__module__}.{cls.__qualname__}",
            "init_args_hash": json_hash(self._init_args),
            "source": self._source,
            "squash": self.squash,
            "range": self.cost_range and list(self.cost_range),
        }

    def training_prompt_keys(self) -> frozenset[str]:
        """Keys of the prompts that it is known to have been trained on."""
        return frozenset()


def plain(value: Any) -> Any:
    """A setting as JSON can hold it.

    Raises:
        TypeError: it is, or holds, an object of which this does not know what is in it.
    """
    if isinstance(value, Enum):
        return [f"{type(value).__module__}.{type(value).__qualname__}", value.name]
    if is_dataclass(value) and not isinstance(value, type):
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        return [name, {f.name: plain(getattr(value, f.name)) for f in fields(value)}]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Scorer) and not value._opaque:
        return [f"{type(value).__module__}.{type(value).__qualname__}", dict(value._init_args)]
    if isinstance(value, type) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    raise TypeError(type(value).__name__)


def one_per_response(scores: Any, count: int, name: str) -> Floats:
    """The scores as a float64 vector of `count`.

    Raises:
        RuntimeError: not numbers, or another shape.
    """
    try:
        if isinstance(scores, torch.Tensor):
            scores = scores.detach().cpu().double().numpy()
        array = np.asarray(scores)
        if array.dtype.kind not in "fiub":
            raise TypeError(f"values of type {array.dtype}")
        vector = array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise RuntimeError(
            f"{name} did not give numbers ({one_line(error)}); expected {count} scores"
        ) from error
    if vector.shape != (count,):
        raise RuntimeError(
            f"{name} gave scores of shape {vector.shape} for {count} responses; expected ({count},)"
        )
    return vector


def measured_moments(scores: Floats, name: str) -> ScoreMoments:
    """Mean and standard deviation (ddof 1) of the reference's scores.

    Raises:
        FloatingPointError: a score is not finite.
        InputError: they do not differ.
    """
    if not np.isfinite(scores).all():
        raise FloatingPointError(f"{name} gave a score that is not finite on the first rollout")
    if scores.size < 2 or not scores.std() > 0:
        raise InputError(
            f"{name} gave all {scores.size} responses of the first rollout the same reward, so it "
            "cannot be standardised; give mean and std"
        )
    return ScoreMoments(float(scores.mean()), float(scores.std(ddof=1)), scores.size)


def source_hash(thing: Any, name: str) -> str:
    """SHA-256 of the file that defines a function or class.

    Raises:
        InputError: there is none, so that no certificate could say what was tested.
    """
    path = source_file(thing)
    if path is None:
        raise InputError(
            f"{name} has no source file, so a certificate could not say what scored the responses; "
            "put it into a Python file"
        )
    return file_sha256(path)


class PythonScorer(Scorer):
    """Scores by a Python function `f(prompts, responses)`.

    `prompts` is a list of dialogues, each a list of {"role": …, "content": …} that ends with a
    user turn; `responses` is a list of texts; what is returned is one number for each. The
    certificate holds the hash of the function's file, and of its module's where that is another
    one (a functools.partial of something else), not of what these import or read.

    Args:
        function: its dotted path, package.module.f.
        mean, std, squash, lower, upper: `Scorer`.
    """

    def __init__(
        self,
        function: str,
        mean: float | None = None,
        std: float | None = None,
        squash: float | None = None,
        lower: float | None = None,
        upper: float | None = None,
    ) -> None:
        super().__init__(mean, std, squash, lower, upper)
        self.path = function

    @cached_property
    def function(self) -> Callable[..., Any]:
        return imported(self.path)

    @property
    def name(self) -> str:
        return self.path

    @cached_property
    def _source(self) -> str:
        own = source_hash(self.function, self.name)
        module = source_file(importlib.import_module(self.path.rpartition(".")[0]))
        other = None if module is None else file_sha256(module)
        return own if other in (None, own) else sha256(own, other)

    def scores(self, prompts: Sequence[Dialogue], responses: Sequence[str]) -> Floats:
        # Copies: a function that changes what it is given must not change the run.
        dialogues = [[dict(message) for message in prompt] for prompt in prompts]
        scores: Floats = self.function(dialogues, list(responses))
        return scores

    def provenance(self) -> dict[str, Any]:
        return {
            "class_path": "hcrlhf.scorers.PythonScorer",
            "function": self.path,
            "source": self._source,
            "squash": self.squash,
            "range": self.cost_range and list(self.cost_range),
        }


def imported(path: str) -> Callable[..., Any]:
    """The function at a dotted path.

    Raises:
        InputError: no such module or function.
    """
    module, _, name = path.rpartition(".")
    if not module:
        raise InputError(f"function: expected package.module.f, got {path!r}")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # its own code runs, and may raise anything
        raise InputError(
            f"function: {path} cannot be imported ({type(error).__name__}: {one_line(error)}); "
            "its folder must be on PYTHONPATH, or be where python -m hcrlhf is started"
        ) from error
    if not callable(found):
        raise InputError(f"function: {path} is a {type(found).__name__}, expected a function")
    return found


class SequenceClassifier(Scorer):
    """Scores by a Hugging Face sequence classifier, encoder or decoder, with its own tokenizer.

    The dialogue is rendered by the classifier's chat template; an encoder without one reads the
    text pair (prompt, response). Of a text that is too long the beginning of the prompt is cut,
    and the end of the response only where it alone does not fit; the first such batch is warned
    of. A folder that `lightning_modules.PreferenceClassifier` wrote brings its own max_tokens,
    mean, std and squash.

    Args:
        model: folder or hub id.
        label: name or number of the label whose log-odds are the score, where there are several.
        max_tokens: of prompt and response together; None takes what the model reads.
        batch_size: texts per forward pass, sorted by length.
        chat_template: None takes the tokenizer's.
        dtype: of the weights; bfloat16 for large decoders, whose score stays in float32.
        mean, std, squash: `Scorer`.
    """

    def __init__(
        self,
        model: str,
        label: int | str | None = None,
        max_tokens: int | None = None,
        batch_size: int = 32,
        chat_template: str | None = None,
        dtype: Dtype = "float32",
        mean: float | None = None,
        std: float | None = None,
        squash: float | None = None,
    ) -> None:
        super().__init__(mean, std, squash)
        if batch_size < 1:
            raise InputError(f"batch_size is a whole number >= 1, got {batch_size}")
        self.model = model
        self.label = label
        self.max_tokens = max_tokens
        self.batch_size = batch_size
        self.chat_template = chat_template
        self.dtype: Dtype = dtype
        self.device = torch.device("cpu")
        self._classifier: Classifier | None = None
        self._fingerprint = ""
        self._warned = False

    @property
    def name(self) -> str:
        return f"SequenceClassifier {self.model}"

    @property
    def classifier(self) -> Classifier:
        if self._classifier is None:
            self._classifier = load_classifier(
                self.model, self.max_tokens, self.label, self.chat_template, self.dtype
            ).requires_grad_(False)
        return self._classifier

    def to(self, device: torch.device) -> None:
        if device != self.device:
            self.classifier.to(device)
            self.device = device

    def prepare(self, slot: Slot) -> None:
        stage = read_classifier_stage(self.model, slot, slot)
        self._fingerprint = fingerprint(self.model)
        if stage is not None:
            if stage.fingerprint != self._fingerprint:
                raise InputError(
                    f"{slot}: the weights in {self.model} are not those that its moments were "
                    "measured with; train it again, or remove its hcrlhf.json"
                )
            if self.mean is None and slot == "reward" and stage.moments is not None:
                self.mean, self.std = stage.moments.mean, stage.moments.std
            self.max_tokens = self.max_tokens or stage.max_tokens
            self.squash = self.squash or stage.squash
            self.arbitrary_zero = stage.sign_weight == 0
        super().prepare(slot)

    def scores(self, prompts: Sequence[Dialogue], responses: Sequence[str]) -> Floats:
        classifier = self.classifier
        texts = [classifier.encode(p, r) for p, r in zip(prompts, responses, strict=True)]
        self._warn_of_cuts(sum(text.cut for text in texts), len(texts))
        order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids))
        scores = np.empty(len(texts))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = classifier.collate([texts[i] for i in rows]).to(self.device)
            scores[rows] = classifier(batch).double().cpu().numpy()
        return scores

    def _warn_of_cuts(self, cut: int, count: int) -> None:
        if cut and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.name}: {cut} of {count} texts are longer than {self.classifier.max_tokens} "
                "tokens; the beginning of their prompts is not read, nor the end of a response "
                "that does not fit alone",
                stacklevel=2,
            )

    def provenance(self) -> dict[str, Any]:
        classifier = self.classifier
        return {
            "class_path": "hcrlhf.scorers.SequenceClassifier",
            "weights": self._fingerprint or fingerprint(self.model),
            "tokenizer": sha256(classifier.tokenizer.backend_tokenizer.to_str()),
            "template": classifier.template and sha256(classifier.template),
            "label": classifier.label,
            "max_tokens": classifier.max_tokens,
            "dtype": self.dtype,
            "squash": self.squash,
        }

    def training_prompt_keys(self) -> frozenset[str]:
        return read_prompt_keys(self.model)
