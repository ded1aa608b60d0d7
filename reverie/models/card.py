"""The card: all that it takes to build a model and to sample from it, as plain data.

A card is JSON, checked and bounded when it is read: it names things in reverie's registries and numbers
for them, and nothing in it is ever imported or run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from reverie.base.errors import ModelFileError

FORMAT = 1
MAX_TIMESTEPS = 100_000
MAX_CARD = 16 << 20  # bytes; a table of 100,000 betas takes two million

Name = Annotated[str, StringConstraints(max_length=200)]
Number = float | int | bool


class Part(BaseModel):
    """A frozen part of a card; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ScheduleSpec(Part):
    """A schedule by name, with its options: {"name": "linear", "options": {"timesteps": 1000}}.

    A table that no name gives is written out in `betas`, and its name is "table".
    """

    name: Name = "linear"
    options: dict[Name, Number] = {}
    betas: Annotated[tuple[float, ...], Field(max_length=MAX_TIMESTEPS)] = ()

    @field_validator("options")
    @classmethod
    def bounded(cls, options: dict[str, Number]) -> dict[str, Number]:
        """Refuse a table that nobody trained on, before it takes memory."""
        count = options.get("timesteps", MAX_TIMESTEPS)
        if isinstance(count, bool) or not isinstance(count, int) or not 2 <= count <= MAX_TIMESTEPS:
            raise ValueError(f"timesteps is {count}; it must be a whole number in 2..{MAX_TIMESTEPS}")
        return options


class NetworkSpec(Part):
    """A network by name, with its configuration."""

    name: Name = "unet"
    config: dict[Name, Any]


class DataRecord(Part):
    """What a model was trained on."""

    name: Name
    fingerprint: Name = ""
    count: int = Field(0, ge=0)
    preparation: Annotated[str, StringConstraints(max_length=2000)] = ""


class TrainingRecord(Part):
    """How a model came about."""

    steps: int = Field(0, ge=0)
    images: int = Field(0, ge=0)
    seed: int = 0
    seconds: float = Field(0.0, ge=0)
    config: dict[Name, Any] = {}


class FittedSolver(Part):
    """A solver that was fitted to the model: what `reverie tune` found for one number of steps.

    Arguments:
        lam: lambda = ln(alpha / sigma) at the start of each step.
        weights: The weights of each step's estimates, the current one's first.
        kept: What each step but the last keeps of its sample, as a part of what is usual; all of it by default.
        guidance: The guidance it was fitted at; None for samples without a class.
        error: Its root-mean-square distance from the exact trajectories' ends, on samples it was not fitted to.
        best_published: The least such distance of the published solvers at as many evaluations.
    """

    lam: Annotated[tuple[float, ...], Field(min_length=1, max_length=1000)]
    weights: tuple[Annotated[tuple[float, ...], Field(min_length=1, max_length=1000)], ...]
    kept: Annotated[tuple[float, ...], Field(max_length=1000)] = ()
    guidance: float | None = None
    error: float = Field(0.0, ge=0)
    best_published: float = Field(0.0, ge=0)

    @property
    def steps(self) -> int:
        """Its number of steps."""
        return len(self.lam)


class WordsSpec(Part):
    """The vocabulary of a network that was trained along with the encoder of its words.

    Arguments:
        entries: The words, and the characters that others are spelt with; `reverie.data.words` says how.
        length: How many numbers a prompt has.
    """

    kind: Literal["words"] = "words"
    entries: Annotated[tuple[Name, ...], Field(max_length=100_000)]
    length: int = Field(ge=1, le=4096)


class ClipSpec(Part):
    """CLIP's text encoders, as Stable Diffusion has them.

    Arguments:
        family: "sd" is one encoder's last layer, "sdxl" the last but one of two, and what the second pools.
        encoders: Their configurations, in transformers' words.
        zero_empty: Whether the empty prompt, as what guidance leads away from, is all zeros.
    """

    kind: Literal["clip"] = "clip"
    family: Literal["sd", "sdxl"] = "sd"
    encoders: Annotated[tuple[dict[Name, Any], ...], Field(min_length=1, max_length=2)]
    zero_empty: bool = False


class CodecSpec(Part):
    """What is between pictures and what is denoised: an autoencoder's latents, z' = scale (z - shift).

    Arguments:
        name: The network's name in `networks`.
        config: Its configuration.
        scale: What makes the latents' variance about one.
        shift: Their mean.
        digest: The sha256 of its weights, where a model was trained on its latents.
    """

    name: Name = "autoencoder"
    config: dict[Name, Any]
    scale: float = Field(1.0, gt=0)
    shift: float = 0.0
    digest: Name = ""


class SamplingDefaults(Part):
    """How a model is sampled where nobody says otherwise.

    Arguments:
        sampler: The sampler's name.
        options: Its options, and those of the grid.
        grid: The time grid's name.
        steps: Intervals of the grid; of a shorter table, all of its entries.
        guidance: How strongly a class that is asked for guides.
        clip: The limit that x_0 is kept within, True for 1; None means 1 for images and no limit for points.
        threshold: The quantile of |x_0| that is scaled back to the limit (dynamic thresholding).
        fitted: Solvers that were fitted to this model, which sampler "auto" uses.
    """

    sampler: Name = "ddim"
    options: dict[Name, Number | Name] = {}
    grid: Name = "trailing"
    steps: int = Field(50, ge=1)
    guidance: float = 1.0
    clip: bool | float | None = None
    threshold: float | None = Field(None, gt=0, le=1)
    fitted: Annotated[tuple[FittedSolver, ...], Field(max_length=1000)] = ()


class Card(Part):
    """A model's card.

    Arguments:
        format: The version of this layout.
        kind: What one sample is: an image (C, H, W) in [-1, 1], or points (D,).
        shape: The shape of one sample.
        network: The network and its configuration.
        schedule: The noise schedule.
        prediction: What the network's output means.
        sigma_data: The data's standard deviation, for prediction "edm".
        learned_variance: Whether the output's second half is the variance's fraction.
        classes: The classes' names.
        unconditional: Whether the network has one label more, the last, for none of the classes.
        text: How prompts are read, where it takes prompts.
        codec: What turns what is denoised into pictures, where it is not pictures itself: then `shape` is that of
            the latents.
        data: What it was trained on.
        training: How.
        teacher: The digest of the model that it began as, where it has few steps by training.
        sampling: Defaults for sampling.
        code: The version of reverie that wrote the card.

    Example:
        >>> card = Card(shape=(1, 8, 8), network=NetworkSpec(config={}), classes=("zero", "one"))
        >>> card.null_label, card.schedule.name
        (2, 'linear')
    """

    format: int = Field(FORMAT, ge=1)
    kind: Literal["image", "points"] = "image"
    shape: Annotated[tuple[Annotated[int, Field(ge=1, le=65536)], ...], Field(min_length=1, max_length=4)]
    network: NetworkSpec
    schedule: ScheduleSpec = ScheduleSpec()
    prediction: Name = "eps"
    sigma_data: float = Field(0.5, gt=0, allow_inf_nan=False)
    learned_variance: bool = False
    classes: Annotated[tuple[Name, ...], Field(max_length=100_000)] = ()
    unconditional: bool = True
    text: Annotated[WordsSpec | ClipSpec, Field(discriminator="kind")] | None = None
    codec: CodecSpec | None = None
    data: DataRecord | None = None
    training: TrainingRecord | None = None
    teacher: Name = ""
    sampling: SamplingDefaults = SamplingDefaults()
    code: Name = ""

    @field_validator("format")
    @classmethod
    def known(cls, number: int) -> int:
        """Refuse a layout that this version has not learned to read."""
        if number > FORMAT:
            raise ValueError(f"{number} is newer than this version's ({FORMAT}): update reverie")
        return number

    @property
    def null_label(self) -> int:
        """The label that stands for no class, where there is one."""
        return len(self.classes)

    @property
    def guidable(self) -> bool:
        """Whether there is something to guide to, and something that stands for nothing."""
        return self.text is not None or bool(self.classes and self.unconditional)

    @property
    def labels(self) -> int | None:
        """How many labels the network must know: None without classes."""
        return len(self.classes) + self.unconditional if self.classes else None


def parse_card(values: Mapping[str, Any] | str | bytes, where: str) -> Card:
    """Return the card of JSON text or of what it holds.

    Arguments:
        values: The text, or the mapping that it was parsed into.
        where: The place it comes from, for the message.

    Raises:
        ModelFileError: It is no card, or one of a newer format.

    Example:
        >>> parse_card({"shape": [2], "kind": "points", "network": {"name": "mlp", "config": {}}}, "a test").shape
        (2,)
    """
    try:
        if isinstance(values, Mapping):
            return Card.model_validate(values)
        return Card.model_validate_json(values)
    except ValidationError as error:
        raise ModelFileError(f"{where} is no card of a model: {sentence(error)}") from None


def read_card(path: Path | str) -> Card:
    """Return the card in a file.

    Raises:
        ModelFileError: The file is missing, or holds no card.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_CARD:
            raise ModelFileError(f"{path} is no card of a model: it is larger than {MAX_CARD} bytes")
        return parse_card(path.read_bytes(), str(path))
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}; is this the folder of a run?") from error


def sentence(error: ValidationError, shown: int = 3) -> str:
    """Return what pydantic found wrong, on one line: the first few complaints and how many more there are."""
    problems = []
    for problem in error.errors(include_url=False, include_input=False):
        place = ".".join(str(part) for part in problem["loc"])[:200]
        message = problem["msg"].removeprefix("Value error, ")
        problems.append(f"{place}: {message}" if place else message)
    more = [f"and {len(problems) - shown} more"] if len(problems) > shown else []
    return "; ".join(problems[:shown] + more)
