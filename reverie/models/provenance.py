"""How a picture was made, in the picture itself.

A PNG of reverie's has two text chunks: `parameters`, in the form that AUTOMATIC1111 made common and that
other programs read, and `reverie`, a JSON object with everything that it takes to make the picture again.
Pictures of other programs are read as far as to print what they say.

References:
    Portable Network Graphics, textual information
    https://www.w3.org/TR/png/#11textinfo
"""

import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from PIL import Image, UnidentifiedImageError
from pydantic import Field, ValidationError

import reverie
from reverie.base.errors import DataError, ModelFileError, UsageError
from reverie.base.randomness import MAX_SEED
from reverie.base.storage import file_digest
from reverie.diffusion.samplers.learned import Learned
from reverie.models.automatic import recipe
from reverie.models.card import FittedSolver, Name, Number, Part, sentence
from reverie.models.formats.run_folder import CHECKPOINTS
from reverie.models.load import load
from reverie.models.model import RECORD_FORMAT, Model, Samples
from reverie.models.sampling import Progress
from reverie.models.settling import DTYPES, MAX_PROMPT, MAX_SIDE
from reverie.models.speed import hasten

OWN, COMMON = "reverie", "parameters"
# Another program's chunk, and the program.
OTHERS = {
    "invokeai_metadata": "InvokeAI",
    "sd-metadata": "InvokeAI",
    "Dream": "InvokeAI",
    "prompt": "ComfyUI",
    "workflow": "ComfyUI",
}
MAX_THREADS = 256
PAIR = re.compile(r'\s*([\w +/-]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


# The record -----------------------------------------------------------------------------------------


Prompt = Annotated[str, Field(max_length=MAX_PROMPT)]


Time = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


class ModelRecord(Part):
    """Which model: the path as it was given, and what of it, by its weights' sha256."""

    source: Annotated[str, Field(max_length=4096)] | None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    checkpoint: Name | None = None
    weights: Name | None = None


class DataName(Part):
    """Which data the model was trained on."""

    name: Name
    fingerprint: Name


class LoraRecord(Part):
    """A LoRA that was merged into the weights: its path as it was given, its sha256, its weight."""

    path: Annotated[str, Field(max_length=4096)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    weight: float


Pixels = Annotated[int, Field(ge=0, le=MAX_SIDE)]


class EditRecord(Part):
    """Which picture was edited, and where: paths as they were given, and the sha256 of what was in them."""

    image: Annotated[str, Field(max_length=4096)] | None
    image_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    mask: Annotated[str, Field(max_length=4096)] | None = None
    mask_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    task: Name | None = None
    factor: Annotated[int, Field(ge=1, le=MAX_SIDE)] = 1
    outpaint: tuple[Pixels, Pixels, Pixels, Pixels] | None = None


class Record(Part):
    """All that it takes to make pictures again: `Samples.record`, checked."""

    format: Annotated[int, Field(ge=1, le=RECORD_FORMAT)]
    model: ModelRecord
    data: DataName | None
    n: Annotated[int, Field(ge=1)]
    seeds: tuple[Seed, ...]
    classes: tuple[Name | None, ...] | None
    prompts: tuple[Prompt, ...] | None = None
    negatives: tuple[Prompt, ...] | None = None
    sampler: Name
    options: dict[Name, Number | Name]
    recipe: FittedSolver | None = None
    grid: Name | Annotated[tuple[float, ...], Field(max_length=1_000_000)]
    steps: Annotated[int, Field(ge=1, le=1_000_000)]
    guidance: float | None
    guidance_interval: tuple[Time, Time] | None = None
    guidance_rescale: Time | None = None
    perturbed: float | None = None
    auto_guidance: float | None = None
    bad: ModelRecord | None = None
    clip: bool | float
    threshold: float | None
    size: tuple[Annotated[int, Field(ge=1, le=MAX_SIDE)], Annotated[int, Field(ge=1, le=MAX_SIDE)]] | None = None
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    upscale: Annotated[int, Field(ge=2, le=8)] | None = None
    upscale_strength: Annotated[float, Field(gt=0, le=1)] | None = None
    edit: EditRecord | None = None
    between: tuple[Seed, Seed, Time] | None = None
    loras: tuple[LoraRecord, ...] = ()
    dtype: Name
    exact: bool
    speed: Literal["exact", "fast"] = "exact"
    weights: Literal["int8"] | None = None
    cache_every: Annotated[int, Field(ge=2, le=1000)] | None = None
    batch_size: int | None
    device: Name
    threads: Annotated[int, Field(ge=1)]
    torch: Name
    reverie: Name


def parameters_text(record: dict[str, Any], size: tuple[int, int]) -> str:
    """Return the record of one picture in AUTOMATIC1111's form.

    Arguments:
        record: The record of one sample.
        size: Its width and height.
    """
    said, source = record["prompts"] or record["classes"], record["model"]["source"]
    away = one_line((record["negatives"] or [""])[0])
    grid = record["grid"] if isinstance(record["grid"], str) else "times"
    pairs = {
        "Steps": record["steps"],
        "Sampler": record["sampler"].upper(),
        "Schedule type": grid.capitalize(),
        "CFG scale": 1.0 if record["guidance"] is None else record["guidance"],
        "Seed": record["seeds"][0],
        "Size": f"{size[0]}x{size[1]}",
        "Model hash": record["model"]["sha256"][:10],
        "Model": Path(source).name if source else "unnamed",
        "Version": f"reverie {record['reverie']}",
    }
    line = ", ".join(f"{name}: {quoted(str(value))}" for name, value in pairs.items())
    prompt = one_line(said[0]) if said else ""
    return "\n".join(part for part in (prompt, away and f"Negative prompt: {away}", line) if part)


def one_line(text: str | None) -> str:
    """Return a text in one line."""
    return " ".join((text or "").split())


def quoted(value: str) -> str:
    """Return a value as it stands in a list of pairs: in quotes where it holds what parts them."""
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:\n"') else value


def parse_parameters(text: str) -> dict[str, str]:
    """Return what AUTOMATIC1111's text says, by name.

    Example:
        >>> parse_parameters("a cat" + chr(10) + "Steps: 20, Seed: 1, Model: x")["Seed"]
        '1'
    """
    *lines, last = text.strip().split("\n")
    pairs = PAIR.findall(last)
    if len(pairs) < 3:  # as that program has it: not a list of settings, but the prompt's last line
        lines, pairs = [*lines, last], []
    prompt, _, negative = "\n".join(lines).partition("Negative prompt:")
    settings = {"prompt": prompt.strip(), "negative prompt": negative.strip()}
    settings = {name: value for name, value in settings.items() if value}
    for name, value in pairs:
        settings[name.strip()] = unquoted(value.strip())
    return settings


def unquoted(value: str) -> str:
    """Return a value without its quotes."""
    if value.startswith('"'):
        try:
            return str(json.loads(value))
        except ValueError:
            return value
    return value


# Reading --------------------------------------------------------------------------------------------


def read_chunks(path: Path | str) -> tuple[dict[str, str], tuple[int, int]]:
    """Return a PNG's text chunks, those before its pixels, and its width and height. No pixel is decoded.

    Raises:
        UsageError: There is no such file.
        DataError: It is no PNG, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"there is no picture {path}; check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # its pixels stay where they are
            with Image.open(path, formats=("PNG",)) as image:
                texts = {str(name): str(value) for name, value in image.info.items() if isinstance(value, str)}
                return texts, image.size
    except UnidentifiedImageError:
        raise DataError(
            f"{path} is no PNG picture; the record of how a picture was made is in PNG files only"
        ) from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as a PNG: {str(error).splitlines()[0]}") from None


def read_provenance(path: Path | str) -> dict[str, Any]:
    """Return how a picture was made: the program, and its settings by name.

    Arguments:
        path: A PNG.

    Returns:
        {"program": ..., "settings": {...}, "size": [width, height]}, with program None where it says nothing.

    Raises:
        UsageError: There is no such file.
        DataError: It is no PNG, or is damaged.
    """
    texts, size = read_chunks(path)
    found: dict[str, Any] = {"program": None, "settings": {}, "size": list(size)}
    if OWN in texts:
        return found | {"program": "reverie", "settings": parse_record(texts[OWN], path).model_dump(mode="json")}
    if COMMON in texts:
        return found | {
            "program": "AUTOMATIC1111, or one that writes as it does",
            "settings": parse_parameters(texts[COMMON]),
        }
    for key, program in OTHERS.items():
        if key in texts:
            settings = {name: json_or_text(texts[name]) for name in OTHERS if name in texts}
            return found | {"program": program, "settings": settings}
    return found


def json_or_text(text: str) -> Any:
    """Return the value of JSON text; the text itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def parse_record(text: str, path: Path | str) -> Record:
    """Return the record in a picture's own chunk.

    Raises:
        DataError: It is damaged, or of a newer version.
    """
    try:
        return Record.model_validate_json(text)
    except ValidationError as error:
        raise DataError(f"{path}: its record is damaged, or of a newer reverie: {sentence(error)}") from None


# Making again ---------------------------------------------------------------------------------------


def again(
    path: Path | str,
    model: Model | Path | str | None = None,
    *,
    device: str | None = None,
    callback: Callable[[Progress], None] | None = None,
    bad: Model | Path | str | None = None,
) -> Samples:
    """Make a picture again, from its own record: bit for bit, where it was made exactly.

    Arguments:
        path: A PNG that reverie wrote.
        model: The model, or its path; the path in the record, where None.
        device: Where to compute; as the record says, where None.
        callback: Called after every step.
        bad: The worse model that guided it, or its path; the path in the record, where None.

    Raises:
        UsageError: There is no such picture, or no model at the path in its record.
        DataError: The picture has no record of reverie's.
        ModelFileError: The model there is not the one that made it, by its weights' sha256.

    Warns:
        RuntimeWarning: This machine or installation differs from the one that made it, so that bits may too.
    """
    texts, _ = read_chunks(path)
    if OWN not in texts:
        raise DataError(f"{path} holds no record of reverie's (the text chunk {OWN!r}), so it can't be made again")
    record = parse_record(texts[OWN], path)
    if record.n != 1 or len(record.seeds) != 1:
        raise DataError(f"{path}: its record is of {record.n} pictures, and a file holds one")
    for line in differences(record):
        warnings.warn(f"{path}: {line}, so the last bits may differ", RuntimeWarning, stacklevel=2)
    device = device or recorded_device(record)
    found = the_one(record.model, path, model, device, "made", record.loras)
    as_fast(found, record, path, not isinstance(model, Model), record.weights)
    worse = None if record.bad is None else the_one(record.bad, path, bad, str(found.device), "guided")
    if worse is not None:
        as_fast(worse, record, path, not isinstance(bad, Model), None)
    with threads(record.threads):
        samples = remade(found, record, path, callback, worse)
    for name, said in (("model", record.model), ("bad", record.bad)):
        samples.record[name] = said and said.model_dump(exclude_none=True) | {"source": said.source}
    return samples


def the_one(
    said: ModelRecord,
    path: Path | str,
    given: Model | Path | str | None,
    device: str,
    did: str,
    loras: Sequence[LoraRecord] = (),
) -> Model:
    """Return the model that a record names, or the one given for it, having made sure of its weights."""
    found = given if isinstance(given, Model) else find_model(said, path, given, device, did)
    put_on(found, loras, path)
    if found.digest != said.sha256:
        raise ModelFileError(
            f"{found.source} is not the model that {did} {path}: its weights have the sha256 {found.digest[:10]}..., "
            f"the record says {said.sha256[:10]}...; give the model that did"
        )
    return found


def as_fast(model: Model, record: Record, path: Path | str, own: bool, weights: str | None) -> None:
    """Have a model compute as a record says.

    Arguments:
        model: The model.
        record: The record.
        path: Where it is from, for the message.
        own: Whether the model was loaded here, so that it may be changed.
        weights: How its weights are to be held.

    Raises:
        UsageError: It is another's, and computes otherwise.
    """
    dtype = DTYPES.get(record.dtype) if record.speed == "fast" else None
    if own and record.speed == "fast":
        hasten(model, dtype, weights, chosen=True)
    if (model.speed.name, model.speed.weights, model.speed.dtype) != (record.speed, weights, dtype):
        how = f"speed {record.speed}" + (f", dtype {record.dtype}" if record.speed == "fast" else "")
        how += f", weights {weights}" if weights else ""
        raise UsageError(f"{path} was made with {how}, and the model given was loaded otherwise; give its path")


def put_on(model: Model, loras: Sequence[LoraRecord], path: Path | str) -> None:
    """Merge the LoRAs of a record into its model, unless they are in it.

    Raises:
        UsageError: A file is not there, or is another.
    """
    if not loras or model.adapted is not None:
        return
    from reverie.models.adapting import adapt

    for lora in loras:
        if not Path(lora.path).is_file() or file_digest(Path(lora.path)).sha256 != lora.sha256:
            raise UsageError(f"{path} was made with the LoRA {lora.path}, which is not there, or is another now")
    model.adapted = adapt(model, {lora.path: lora.weight for lora in loras})


def remade(
    model: Model,
    record: Record,
    path: Path | str,
    callback: Callable[[Progress], None] | None,
    bad: Model | None = None,
) -> Samples:
    """Return the sample of a record: drawn, or edited from the picture that the record names.

    Raises:
        UsageError: The picture is not where it was, or is another.
    """
    if record.between is not None:
        first, second, place = record.between
        how = {name: value for name, value in request(record).items() if name != "seed"}
        return model.on_the_way(first, second, [place], callback, **how, bad=bad)
    if record.edit is None:
        return model.sample(1, **request(record), bad=bad, callback=callback)
    if record.edit.image is None or (
        record.edit.mask_sha256 and record.edit.mask is None and record.edit.image is None
    ):
        raise UsageError(f"{path} was edited from a picture that came from no file, so it can't be made again")
    factor = record.edit.factor if record.edit.factor > 1 else None
    original = model.original(record.edit.image, record.edit.mask, record.edit.task, factor, record.edit.outpaint)
    if original.record() != record.edit.model_dump(mode="json"):
        raise UsageError(f"{record.edit.image}, or its mask, is not what {path} was edited from: its pixels differ")
    asked = request(record) | {"size": None, "bad": bad}
    plan = model.plan_edit(original, 1, strength=record.strength, **asked)
    return model.execute(plan, callback, original)


def interpolated(
    model: Model,
    first: Path | str,
    second: Path | str,
    n: int,
    *,
    callback: Callable[[Progress], None] | None = None,
    **changes: Any,
) -> Samples:
    """Draw n samples on the way between two that a model drew, by their pictures' records.

    Arguments:
        model: The consistency model that drew both.
        first: A PNG that reverie wrote.
        second: Another, drawn in the same way: they differ by their seeds.
        n: How many, both ends among them.
        callback: Called after every step.
        changes: What is to be otherwise than in the records, as `Model.sample` takes it; None is nothing.

    Raises:
        UsageError: They are not two samples of this model in the same way, or it is no consistency model.
        DataError: A picture has no record of reverie's.
    """
    one, other = (sample_record(path, model) for path in (first, second))
    ways = [{name: value for name, value in request(record).items() if name != "seed"} for record in (one, other)]
    if differ := [name for name, value in ways[0].items() if ways[1].get(name, value) != value]:
        raise UsageError(f"{first} and {second} were drawn in other ways ({', '.join(differ)}); draw both alike")
    how = ways[0] | {name: value for name, value in changes.items() if value is not None}
    return model.interpolate(one.seeds[0], other.seeds[0], n, callback=callback, **how)


def sample_record(path: Path | str, model: Model) -> Record:
    """Return the record of a picture that a model drew from noise.

    Raises:
        UsageError: It is an edit, or another model's.
        DataError: It has none.
    """
    texts, _ = read_chunks(path)
    if OWN not in texts:
        raise DataError(f"{path} holds no record of reverie's (the text chunk {OWN!r}): its noise is not known")
    record = parse_record(texts[OWN], path)
    if record.edit is not None or record.between is not None or len(record.seeds) != 1:
        raise UsageError(f"{path} is not one sample from noise; interpolate between two that reverie sample drew")
    if record.model.sha256 != model.digest:
        raise UsageError(f"{path} was drawn by another model (sha256 {record.model.sha256[:10]}...); take that one")
    return record


def request(record: Record) -> dict[str, Any]:
    """Return the arguments of `Model.sample` that a record stands for."""
    how: dict[str, Any] = {
        "sampler": record.sampler,
        "grid": record.grid if isinstance(record.grid, str) else list(record.grid),
    }
    if record.recipe is not None:
        how = {"sampler": Learned(recipe(record.recipe)), "grid": None}
    return {
        **how,
        "seed": record.seeds[0],
        "classes": record.classes[0] if record.classes else None,
        **prompts(record),
        "steps": record.steps,
        "guidance": record.guidance,
        "guidance_interval": record.guidance_interval,
        "guidance_rescale": record.guidance_rescale,
        "perturbed": record.perturbed,
        "auto_guidance": record.auto_guidance,
        "clip": record.clip,
        "threshold": record.threshold,
        "size": record.size,
        "dtype": record.dtype,
        "exact": record.exact,
        "cache_every": record.cache_every,
        "upscale": record.upscale,
        "upscale_strength": record.upscale_strength,
        "batch_size": record.batch_size,
        **record.options,
    }


def prompts(record: Record) -> dict[str, str]:
    """Return the prompt of a record and what it was guided away from, where there is any."""
    if not record.prompts or record.guidance is None:
        return {}
    away = record.negatives[0] if record.negatives else ""
    return {"prompt": record.prompts[0]} | ({"negative_prompt": away} if away else {})


def recorded_device(record: Record) -> str:
    """Return the device that a record names, or the CPU where that is not here."""
    return "cuda" if record.device == "cuda" and torch.cuda.is_available() else "cpu"


def differences(record: Record) -> Iterator[str]:
    """Yield what is otherwise here than where a picture was made."""
    if record.torch != str(torch.__version__):
        yield f"made with torch {record.torch}, here is {torch.__version__}"
    if record.reverie != reverie.__version__:
        yield f"made with reverie {record.reverie}, here is {reverie.__version__}"
    if record.device != recorded_device(record):
        yield f"made on {record.device}, which is not here"
    if not record.exact:
        yield f"made {'fast' if record.speed == 'fast' else 'in free batches'}, not exactly"
    if record.threads > MAX_THREADS:
        yield f"made with {record.threads} threads, more than are tried here"


def find_model(said: ModelRecord, path: Path | str, given: Path | str | None, device: str, did: str = "made") -> Model:
    """Return the model of a record: at the path given, or at its own, or the run's checkpoint that it names."""
    source = str(given) if given is not None else said.source
    if source is None:
        raise UsageError(f"{path} was {did} by a model that came from no file; give the model")
    if given is None and not Path(source).exists():
        raise UsageError(f"{path} was {did} by the model {source}, which is not there; give the path of the model")
    kept = said.weights
    ema = None if kept is None else kept if kept.startswith("ema-") else "none"
    checkpoint = Path(source) / CHECKPOINTS / (said.checkpoint or "")
    if said.checkpoint and re.fullmatch(r"step-[\d-]+", said.checkpoint) and checkpoint.is_dir():
        return load(checkpoint, device=device, ema=ema)
    takes_ema = (Path(source) / CHECKPOINTS).is_dir()
    return load(source, device=device, ema=ema if takes_ema else None)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """A block in which torch computes with so many threads, on which the last bits depend."""
    before = torch.get_num_threads()
    if count != before and count <= MAX_THREADS:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
