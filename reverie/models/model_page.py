"""The page of a model: a README.md with the front matter that the Hugging Face hub reads."""

import reverie
from reverie.models.model import Model

PIPELINE = """from diffusers import {kind}Pipeline

pipeline = {kind}Pipeline.from_pretrained("{path}")
pictures = pipeline(batch_size=4, num_inference_steps={steps}{clipped}).images
"""

LOOP = """import torch
from diffusers import {kind}Scheduler, UNet2DModel

unet = UNet2DModel.from_pretrained("{path}", subfolder="unet")
scheduler = {kind}Scheduler.from_pretrained("{path}", subfolder="scheduler")
scheduler.set_timesteps({steps})
labels = torch.tensor([0])  # {classes}{null}
x = torch.randn(1, {shape})
for t in scheduler.timesteps:
    with torch.no_grad():
        output = unet(x, t, class_labels=labels).sample
    x = scheduler.step(output, t, x{clipped}).prev_sample
"""

REVERIE = """import reverie as rv

samples = rv.sample("{path}", 4{classes}, seed=0)
samples.pil()[0].save("sample.png")
"""


def model_page(model: Model, kind: str) -> str:
    """Return the README.md of a model's folder.

    Arguments:
        model: The model.
        kind: The name of the folder's format.
    """
    parts = [front_matter(kind), f"# {title(model)}", "", *facts(model), "", "```python", usage(model), "```", ""]
    if kind == "diffusers":
        if model.card.classes:
            parts += ["Its pipelines know no classes, so with diffusers a loop draws them:", ""]
        parts += ["```python", diffusers_usage(model), "```", ""]
    return "\n".join(parts)


def front_matter(kind: str) -> str:
    """Return the part that the hub reads."""
    library = "diffusers" if kind == "diffusers" else "reverie"
    task = "unconditional-image-generation"
    lines = [f"library_name: {library}", f"pipeline_tag: {task}", "tags:", "- reverie", "- diffusion", f"- {task}"]
    return "\n".join(["---", *lines, "---", ""])


def title(model: Model) -> str:
    """Return what it is, in a line."""
    data = f" trained on {plain(model.card.data.name)}" if model.card.data else ""
    return f"A diffusion model{data}"


def facts(model: Model) -> list[str]:
    """Return a table of what is known of it."""
    card = model.card
    sampling = card.sampling
    rows = {
        "samples": f"{'x'.join(map(str, card.shape))} ({card.kind})",
        "network": f"{card.network.name}, {model.parameters:,} parameters",
        "schedule": card.schedule.name,
        "predicts": card.prediction + (", and its variance" if card.learned_variance else ""),
        "sampled with": f"{sampling.sampler}, {sampling.steps} steps on {sampling.grid}",
        "weights (sha256)": model.digest,
        "reverie": card.code or reverie.__version__,
    }
    if card.classes:
        rows["classes"] = plain(", ".join(card.classes[:50])) + (", ..." if len(card.classes) > 50 else "")
    if card.data:
        rows["data"] = f"{plain(card.data.name)}, {card.data.count} samples, fingerprint {plain(card.data.fingerprint)}"
    if card.training:
        rows["training"] = f"{card.training.steps} steps, {card.training.images} samples, seed {card.training.seed}"
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def usage(model: Model) -> str:
    """Return how it is sampled here."""
    classes = f", classes={model.card.classes[0]!r}" if model.card.classes else ""
    return REVERIE.format(path="PATH", classes=classes).rstrip()


def diffusers_usage(model: Model) -> str:
    """Return how it is sampled with diffusers: by a pipeline, or by a loop where there are classes."""
    card = model.card
    entries = getattr(model.denoiser.schedule, "timesteps", 50)
    words: dict[str, str | int] = {"path": "PATH", "kind": "DDIM", "steps": min(50, entries)}
    words["clipped"] = ", use_clipped_model_output=True"
    if card.learned_variance:  # of which their DDIM knows nothing
        words |= {"kind": "DDPM", "steps": entries, "clipped": ""}
    if not card.classes:
        return PIPELINE.format(**words).rstrip()
    listed = ", ".join(f"{i} {plain(name)}" for i, name in enumerate(card.classes[:10]))
    null = f"; {card.null_label} is none of them" if card.unconditional else ""
    return LOOP.format(**words, classes=listed, null=null, shape=", ".join(map(str, card.shape))).rstrip()


def plain(text: str) -> str:
    """Return text as it can stand in a table: on one line, without bars.

    Example:
        >>> plain("a | b" + chr(10) + "c")
        'a / b c'
    """
    return " ".join(text.replace("|", "/").split())
