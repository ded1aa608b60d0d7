"""The model: a denoiser with its card, which is what is saved, loaded, sampled and served."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

import reverie
from reverie.base.errors import NonFiniteError, UsageError
from reverie.diffusion.denoisers import NetworkDenoiser
from reverie.diffusion.samplers.base import Sampler
from reverie.models.card import Card
from reverie.models.codec import Codec
from reverie.models.conditioning import Conditioner, build_conditioner
from reverie.models.editing import Original, Picture, give, outpainted, padded_size, read_original
from reverie.models.enlarging import enlarged, with_second
from reverie.models.footprint import working_bytes
from reverie.models.guiding import Worse
from reverie.models.plan import SamplingPlan, make_plan
from reverie.models.sampling import Intermediate, Progress, execute
from reverie.models.speed import EXACT, Speed, arithmetic, refuse_packed
from reverie.models.tasks import ROUNDS, Between, check_task, factor_of, shares, within

RECORD_FORMAT = 1
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


_MAPPED: ContextVar[bool] = ContextVar("mapped", default=False)


@contextmanager
def mapped() -> Iterator[None]:
    """A block in which a model's weights stay as they are in its file: they are to be laid out otherwise."""
    token = _MAPPED.set(True)
    try:
        yield
    finally:
        _MAPPED.reset(token)


class Model:
    """A denoiser with its card.

    Arguments:
        denoiser: A network as a denoiser.
        card: What it is.
        source: The path that it came from, as it was given; None for one that was made here.
        origin: What of that path it is: {"checkpoint": "step-00000500", "weights": "ema-0.999"}.
        warnings: What went otherwise than hoped for when it was read, in sentences.
        conditioner: What reads prompts; of a network with an encoder of its own, that one.
        codec: What turns latents into pictures, where it is latents that are denoised.

    Example:
        >>> from reverie.models.builders import build
        >>> from reverie.models.card import NetworkSpec
        >>> card = Card(shape=(1, 8, 8), network=NetworkSpec(config={"in_channels": 1, "channels": [8, 8]}))
        >>> Model(build(card), card).sample(2, steps=1).uint8.shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        denoiser: NetworkDenoiser,
        card: Card,
        source: str | None = None,
        origin: Mapping[str, str] | None = None,
        warnings: Sequence[str] = (),
        conditioner: Conditioner | None = None,
        codec: Codec | None = None,
    ) -> None:
        # With channels innermost convolutions need no reordering: 1.1 times as fast at 28 pixels, 3 times at 64.
        for network in (denoiser.network, codec):
            if network is not None and not _MAPPED.get():
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.codec = codec
        self.conditioner = conditioner or build_conditioner(card, denoiser.network)
        self.denoiser, self.card, self.source = denoiser, card, source
        self.adapted: Any = None  # the LoRAs and new words that `load` put on it
        self.origin, self.warnings = dict(origin or {}), tuple(warnings)
        self.speed: Speed = EXACT  # `hasten` makes it another
        self._digest: tuple[tuple[object, ...], str] | None = None
        self._identity: tuple[str, int] | None = None  # of weights that are laid out otherwise now

    def __repr__(self) -> str:
        shape = "x".join(str(size) for size in self.card.shape)
        return f"Model({self.card.network.name}, {self.parameters:,} parameters, {shape}, from {self.source})"

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.denoiser.network.parameters()).device

    @property
    def parameters(self) -> int:
        """How many numbers were trained."""
        if self._identity is not None:
            return self._identity[1]
        return sum(parameter.numel() for parameter in self.denoiser.network.parameters())

    @property
    def digest(self) -> str:
        """The sha256 of the weights: their names, types, shapes and numbers, whatever file they came from."""
        if self._identity is not None:
            return self._identity[0]
        state = self.denoiser.network.state_dict()
        version = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in state.values())
        if self._digest is None or self._digest[0] != version:
            self._digest = version, weights_digest(state)
        return self._digest[1]

    def with_card(self, card: Card) -> "Model":
        """Return the same model, of the same parts, under another card."""
        other = copy(self)
        other.card = card
        return other

    def keep_identity(self) -> None:
        """Remember the weights' sha256 and number: they are about to be laid out otherwise."""
        self._identity = self.digest, self.parameters

    def to(self, device: str | torch.device) -> "Model":
        """Move the network to a device, and return the model itself.

        Raises:
            UsageError: Its weights are laid out for the CPU.
        """
        if torch.device(device).type != "cpu":
            refuse_packed(self, "moved")
        self.denoiser.to(device)
        for part in (self.conditioner, self.codec):
            if part is not None:
                part.to(device)
        return self

    def plan(self, n: int, **request: Any) -> SamplingPlan:
        """Return what `sample` would do with the same arguments, without doing it.

        Raises:
            UsageError: Something is out of range, unknown, or would have no effect.
        """
        factor = self.codec.factor if self.codec else 1
        if request.get("bad") is not None:
            request["bad"] = self.worse(request["bad"])
        larger = [request.pop(name, None) for name in ("upscale", "upscale_strength")]
        plan = make_plan(self.denoiser, self.card, n, factor=factor, speed=self.speed, **request)
        return with_second(plan, self.denoiser.schedule, *larger)

    def worse(self, bad: "Model | Path | str") -> Worse:
        """Return a model, or the one at a path, as the worse one that guides this one."""
        if not isinstance(bad, Model):
            bad = self.worse_model(bad)
        if bad.device != self.device:
            raise UsageError(f"bad is on {bad.device}, this model on {self.device}; move one of them")
        if bad.speed.name != self.speed.name:
            raise UsageError(
                f"bad was loaded with speed {bad.speed.name}, this model with {self.speed.name}; load both alike"
            )
        return Worse(bad.denoiser, bad.card, bad.conditioner, bad.identity())

    def worse_model(self, path: Path | str) -> "Model":
        """Return the model at a path, where this one is and computing as it does."""
        from reverie.models.load import load

        dtype = self.speed.dtype or torch.float32 if self.speed.name == "fast" else None
        return load(path, device=self.device, dtype=dtype, speed=self.speed.name)

    def identity(self) -> dict[str, str | None]:
        """Return which model it is, as JSON holds it: the path as it was given, the sha256, what of the path it is."""
        return {"source": self.source, "sha256": self.digest, **self.origin}

    def sample(
        self,
        n: int,
        *,
        seed: int | Sequence[int] = 0,
        classes: int | str | Sequence[int | str] | None = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        sampler: str | Sampler | None = None,
        steps: int | None = None,
        grid: str | Sequence[float] | Tensor | None = None,
        guidance: float | None = None,
        guidance_interval: Sequence[float] | None = None,
        guidance_rescale: float | None = None,
        perturbed: float | None = None,
        auto_guidance: float | None = None,
        bad: "Model | Path | str | None" = None,
        clip: bool | float | None = None,
        threshold: float | None = None,
        size: int | Sequence[int] | None = None,
        batch_size: int | None = None,
        exact: bool | None = None,
        dtype: str | torch.dtype | None = None,
        cache_every: int | None = None,
        upscale: int | None = None,
        upscale_strength: float | None = None,
        intermediates: int | Sequence[int] = 0,
        callback: Callable[[Progress], None] | None = None,
        **options: Any,
    ) -> "Samples":
        """Draw samples. What is None comes from the card.

        Arguments:
            n: How many.
            seed: The first one's seed, each further one's being one more; or the seed of each.
            classes: The class of all, or of each, by name or index; None draws without a class.
            prompt: What all are to show, or each, in words; None draws without.
            negative_prompt: What guidance leads away from, instead of from nothing.
            sampler: A name in `samplers`, or a sampler.
            steps: How often the sampler steps: exactly so many.
            grid: A name in `grids`, or times in (0, 1], or a table's timesteps, decreasing.
            guidance: w of classifier-free guidance: 0 ignores the class, 1 asks for it, more insists.
            guidance_interval: Two times (low, high): guidance of any kind for low < t <= high, elsewhere none.
            guidance_rescale: phi in [0, 1]: how much of the contrast that guidance adds is taken back.
            perturbed: s of perturbed-attention guidance, away from the network with its attention broken; 0 is none.
            auto_guidance: w of autoguidance, away from a worse model; 1 is none.
            bad: That worse model, or its path: of the same shape, schedule and classes.
            clip: The limit that x_0 is kept within; True for 1, False for none.
            threshold: Dynamic thresholding: the quantile of |x_0| that is scaled back to the limit.
            size: Height and width of the pictures, or one number for both; the model's own, where None.
            batch_size: How many go through the steps together: memory against speed, nothing else.
            exact: A sample's bits depend on the model, its seed and these settings alone, not on n, on
                batch_size or on its neighbours (on a CPU, at one number of threads). True, where None, unless
                the model was loaded with speed fast.
            dtype: What the network computes in: float32 or bfloat16.
            cache_every: Ask the lower levels of a U-Net at every N-th call alone; with speed fast.
            upscale: How many times as high and wide the pictures are drawn again, in a second pass of as many steps.
            upscale_strength: The time that the enlarged pictures are taken back to, in (0, 1]; 0.5, if not said.
            intermediates: Keep so many states on the way, evenly spaced, or those after the steps listed.
            callback: Called after every step; what it raises ends the sampling.
            options: The sampler's own options, such as eta for ddim and variance for ddpm, and the grid's.

        Raises:
            UsageError: Something is out of range, unknown, or would have no effect.
            NonFiniteError: A step gave NaN or infinity.
            OutOfMemoryError: There is not enough memory.
        """
        plan = self.plan(
            n, seed=seed, classes=classes, prompt=prompt, negative_prompt=negative_prompt, sampler=sampler, steps=steps,
            grid=grid, guidance=guidance, guidance_interval=guidance_interval, guidance_rescale=guidance_rescale,
            perturbed=perturbed, auto_guidance=auto_guidance, bad=bad, clip=clip, threshold=threshold, size=size,
            batch_size=batch_size, exact=exact, dtype=dtype, cache_every=cache_every, upscale=upscale,
            upscale_strength=upscale_strength, intermediates=intermediates,
            **options,
        )  # fmt: skip
        return self.execute(plan, callback)

    def edit(
        self,
        image: Picture,
        n: int = 1,
        *,
        mask: Picture | None = None,
        strength: float | None = None,
        task: str | None = None,
        factor: int | None = None,
        outpaint: int | Sequence[int] | None = None,
        callback: Callable[[Progress], None] | None = None,
        **request: Any,
    ) -> "Samples":
        """Draw samples that start from a picture: the whole of it, or what a mask leaves to be made anew.

        Arguments:
            image: The picture: a path, a Pillow image, or a tensor (C, H, W). Of any size: it is continued to what
                the model needs, and cut back.
            n: How many.
            mask: White where it is to be made anew; the rest comes back as it was, bit for bit.
            strength: The time that it is taken back to, in [0, 1]: 0 leaves it as it is. 0.8, or 1 with a mask; a
                task begins with noise alone.
            task: What a consistency model does with it: inpaint, colourise or super-resolution (tasks.py).
            factor: Of super-resolution, how many times as high and wide; to the model's size, if not said.
            outpaint: Pixels to add to the left, the top, the right and the bottom, or one number for all sides: they
                are drawn, and the picture itself comes back bit for bit.
            callback: Called after every step; what it raises ends the sampling.
            request: As `sample` takes it: prompt, seed, steps, guidance, ...

        Raises:
            UsageError: Something is out of range, unknown, or would have no effect; a mask of another size.
            DataError: The picture can't be read.
        """
        original = self.original(image, mask, task, factor, outpaint)
        if task is not None:
            if strength is not None:
                raise UsageError("strength has no effect on a task, which begins with noise alone; leave it out")
            return self.execute(self.plan_edit(original, n, strength=1.0, **request), callback, original)
        strength = (0.8 if original.mask is None else 1.0) if strength is None else strength
        if strength == 0 and outpaint is not None:
            raise UsageError("strength is 0, which draws nothing, beside outpaint, which is to be drawn; raise it")
        if strength == 0:
            plan = self.plan_edit(original, n, strength=1e-9, **request)
            same = (original.pixels.float() / 127.5 - 1).expand(plan.n, -1, -1, -1)
            return Samples(
                same.clone(), torch.tensor(plan.seeds), None, self.record(plan) | {"edit": original.record()}
            )
        return self.execute(self.plan_edit(original, n, strength=strength, **request), callback, original)

    def interpolate(
        self, first: int, second: int, n: int = 8, *, callback: Callable[[Progress], None] | None = None, **request: Any
    ) -> "Samples":
        """Draw samples on the way between those of two seeds, both ends among them: by a consistency model.

        Arguments:
            first: The seed that it begins with.
            second: The seed that it ends with.
            n: How many, at least 2.
            callback: Called after every step; what it raises ends the sampling.
            request: As `sample` takes it: classes, steps, ...

        Raises:
            UsageError: Something is out of range, unknown, or would have no effect.
        """
        check_task(self.card, "interpolate", masked=False)
        return self.on_the_way(first, second, shares(n), callback, **request)

    def on_the_way(
        self,
        first: int,
        second: int,
        places: Sequence[float],
        callback: Callable[[Progress], None] | None = None,
        **request: Any,
    ) -> "Samples":
        """Draw a sample for each share of the way between those of two seeds."""
        plan = self.plan(len(places), seed=[first] * len(places), **request)
        if plan.second is not None:
            raise UsageError("upscale has no effect on samples between two others; leave it out")
        beside = working_bytes(self.denoiser.network, self.codec, plan)
        noise = Between(plan.seeds, second, places)
        x, _ = execute(self.denoiser, plan, callback, self.conditioner, None, beside, noise)
        labels = None if plan.labels is None else torch.tensor(plan.labels)
        record = self.record(plan) | {"between": [[first, second, place] for place in places]}
        return Samples(x.clamp(-1, 1), torch.tensor(plan.seeds), labels, record)

    def original(
        self,
        image: Picture,
        mask: Picture | None = None,
        task: str | None = None,
        factor: int | None = None,
        outpaint: int | Sequence[int] | None = None,
    ) -> Original:
        """Return a picture, its mask and what is done with it as this model takes them."""
        if self.card.kind != "image":
            raise UsageError(f"this is a model of {self.card.kind}; it edits no pictures")
        channels = 3 if self.codec else self.card.shape[0]
        found = read_original(image, mask, channels)
        if outpaint is not None:
            found = outpainted(found, outpaint)
        if self.fills and found.mask is None:
            raise UsageError("this model was trained to fill in; give a mask, white where it is to draw")
        if factor is not None and task != "super-resolution":
            raise UsageError(f"factor is {factor}, which has no effect but on task super-resolution; leave it out")
        if task is None:
            found.check_mask()
            return found
        if task == "interpolate":
            raise UsageError("task interpolate is between two samples, by their seeds: Model.interpolate")
        check_task(self.card, task, found.mask is not None)
        found.check_mask()
        times = factor_of(found.size, self.card, factor) if task == "super-resolution" else 1
        return replace(found, task=task, factor=times)

    @property
    def fills(self) -> bool:
        """Whether the network was trained to fill in: it sees the mask and what it leaves beside its input."""
        config = getattr(self.denoiser.network, "config", None)
        return self.card.kind == "image" and getattr(config, "in_channels", 0) > self.card.shape[0]

    def plan_edit(self, original: Original, n: int, **request: Any) -> SamplingPlan:
        """Return what `edit` would do with the same arguments, without doing it."""
        if "size" in request and request["size"] is not None:
            raise UsageError("size has no effect here: an edit has the size of its picture")
        request["size"] = padded_size(original.size, self.codec.factor if self.codec else 1)
        if original.task is not None:
            request = request | {name: usual for name, usual in ROUNDS.items() if request.get(name) is None}
        return self.plan(n, **request)

    def execute(
        self,
        plan: SamplingPlan,
        callback: Callable[[Progress], None] | None = None,
        original: Original | None = None,
    ) -> "Samples":
        """Carry out a plan that `plan` made, or `plan_edit` for a picture."""
        if self.fills and original is None:
            raise UsageError("this model was trained to fill in: give it a picture and a mask (reverie edit)")
        given = None if original is None else give(original, self.codec, self.device, self.fills)
        beside = working_bytes(self.denoiser.network, self.codec, plan)
        x, passed = execute(self.denoiser, plan, callback, self.conditioner, given, beside)
        if plan.second is not None:
            beside = working_bytes(self.denoiser.network, self.codec, plan.second)
            x = enlarged(self.denoiser, plan, x, callback, self.conditioner, beside)
        labels = None if plan.labels is None else torch.tensor(plan.labels)
        if self.codec is not None:
            x, passed = self.decoded(x), tuple(replace(one, x0=self.decoded(one.x0)) for one in passed)
        images = x.clamp(-1, 1) if self.card.kind == "image" else x
        record = self.record(plan)
        if given is not None and given.known is not None:
            images = within(given.known, x)
        if original is not None:
            images = original.pasted(images[:, :, : original.size[0], : original.size[1]])
            record["edit"] = original.record()
        return Samples(images, torch.tensor(plan.seeds), labels, record, passed)

    def decoded(self, latents: Tensor) -> Tensor:
        """Return the pictures (n, C, H, W) of latents, on the CPU, each decoded by itself."""
        assert self.codec is not None
        with torch.no_grad(), arithmetic(self.device, self.speed):
            return torch.cat([self.codec.decode(one[None].to(self.device)).cpu() for one in latents])

    def record(self, plan: SamplingPlan) -> dict[str, Any]:
        """Return all that it takes to make the samples of a plan again, as JSON holds it."""
        data = self.card.data
        return {
            "format": RECORD_FORMAT,
            "model": self.identity(),
            "loras": self.adapted.files if self.adapted else [],
            "data": {"name": data.name, "fingerprint": data.fingerprint} if data else None,
            "n": plan.n,
            "seeds": list(plan.seeds),
            "classes": self.class_names(plan.labels),
            "prompts": None if plan.prompts is None else list(plan.prompts),
            "negatives": None if plan.negatives is None else list(plan.negatives),
            **plan.settings(),
            "edit": None,
            "between": None,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "reverie": reverie.__version__,
        }

    def class_names(self, labels: Sequence[int] | None) -> list[str | None] | None:
        """Return the names of labels, None for no class; None for a model without classes."""
        if labels is None:
            return None
        return [self.card.classes[label] if label < len(self.card.classes) else None for label in labels]


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 of tensors by name, in the order of their names.

    Example:
        >>> weights_digest({"a": torch.zeros(2), "b": torch.ones(1)})[:10]
        '0220c8c34f'
    """
    total = sha256()
    for name in sorted(state):
        tensor = state[name].detach()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


# Samples --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """What a model drew.

    Arguments:
        images: The samples (n, C, H, W), in [-1, 1]; of a model of points (n, D).
        seeds: Each one's seed (n,).
        labels: Each one's label (n,); None for a model without classes.
        record: All that it takes to make them again, as JSON holds it.
        intermediates: Where they were on the way.
    """

    images: Float[Tensor, "n ..."]
    seeds: Int64[Tensor, " n"]
    labels: Int64[Tensor, " n"] | None
    record: dict[str, Any]
    intermediates: tuple[Intermediate, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.images)

    @property
    def uint8(self) -> UInt8[Tensor, "n c h w"]:
        """The samples as bytes (n, C, H, W)."""
        if self.images.ndim != 4:
            raise UsageError(f"these samples are points of {tuple(self.images.shape[1:])}, and no pictures")
        return to_uint8(self.images)

    def class_of(self, i: int) -> str | None:
        """Return the name of sample i's class."""
        names = self.record["classes"]
        return names[i] if names else None

    def record_of(self, i: int) -> dict[str, Any]:
        """Return all that it takes to make sample i again, alone."""
        each = ("classes", "prompts", "negatives")
        own = {name: [found[i]] if (found := self.record[name]) else None for name in each}
        own["between"] = found[i] if (found := self.record["between"]) else None
        return self.record | own | {"n": 1, "seeds": [int(self.seeds[i])]}

    def pil(self) -> list[Image.Image]:
        """Return the samples as Pillow's images."""
        return [to_pil(image) for image in self.uint8]


def to_uint8(images: Float[Tensor, "*d"]) -> UInt8[Tensor, "*d"]:
    """Return images in [-1, 1] as bytes: 127.5 x + 127.5, rounded.

    Raises:
        NonFiniteError: A number is NaN or infinite: no byte stands for it.

    Example:
        >>> to_uint8(torch.tensor([-1.0, 0.0, 1.0, 1.2])).tolist()
        [0, 128, 255, 255]
    """
    if bad := int((~images.isfinite()).sum()):
        raise NonFiniteError(f"{bad} of the {images.numel()} numbers of the images are not finite; nothing was written")
    return (127.5 * images + 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(image: UInt8[Tensor, "c h w"]) -> Image.Image:
    """Return a picture (C, H, W) as Pillow's: grey, grey and alpha, RGB or RGBA."""
    mode = MODES.get(image.shape[0])
    if mode is None:
        raise UsageError(f"a picture of {image.shape[0]} channels is no grey, RGB or RGBA one; take `images` instead")
    pixels = image.cpu().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode)
