"""What a file in Stable Diffusion's original layout is, by the names and shapes of its tensors alone.

How each thing is decided:

| thing | by |
|---|---|
| 1.x | the transformers' ends are 1x1 convolutions, nothing joins the time |
| 2.x | the transformers' ends are matrices, nothing joins the time |
| XL | the first level does not attend, and a vector joins the time (label_emb) |
| XL refiner | XL whose first text encoder is OpenCLIP; without any text encoder, XL of four levels |
| inpainting, depth, instructions | the first convolution takes 9, 5 or 8 channels instead of 4 |
| heads | 8 at every level of 1.x; of 64 channels each in 2.x and XL |
| six or five sizes | six of XL, five of its refiner |
| last layer of OpenCLIP in 2.x | unused, where the file has the projection that only all of OpenCLIP has |
| what is predicted | the header's `modelspec.prediction_type`; a tensor `v_pred`; otherwise v for 2.x, else eps |

The last is a guess for 2.x from text alone: its base of 512 pixels predicts eps with the same tensors.

References:
    Stable Diffusion 1 and 2, and generative models (XL): the code that the names come from
    https://github.com/CompVis/stable-diffusion
    https://github.com/Stability-AI/stablediffusion
    https://github.com/Stability-AI/generative-models
    Stability.AI Model Metadata Standard Specification, for the header's words
    https://github.com/Stability-AI/ModelSpec
    Support and automatically detect SDXL V-prediction models, for the tensors v_pred and ztsnr
    https://github.com/AUTOMATIC1111/stable-diffusion-webui/pull/16567
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from reverie.base.errors import ModelFileError
from reverie.models.formats.latent_diffusion import autoencoder_names, text_names, unet_names
from reverie.models.formats.latent_diffusion.renaming import Form, Rule, Shape, Shapes, renamed, sized

Family = Literal["sd1", "sd2", "sdxl", "sdxl-refiner", "autoencoder"]

UNET, VAE = "model.diffusion_model.", "first_stage_model."
# The text encoders: the part that diffusers keeps each in, and whether it is in OpenCLIP's names.
TEXTS: dict[Family, dict[str, tuple[str, bool]]] = {
    "sd1": {"cond_stage_model.transformer.": ("text_encoder", False)},
    "sd2": {"cond_stage_model.model.": ("text_encoder", True)},
    "sdxl": {
        "conditioner.embedders.0.transformer.": ("text_encoder", False),
        "conditioner.embedders.1.model.": ("text_encoder_2", True),
    },
    "sdxl-refiner": {"conditioner.embedders.0.model.": ("text_encoder_2", True)},
    "autoencoder": {},
}
PREFIXES = (UNET, VAE, *(prefix for texts in TEXTS.values() for prefix in texts))
XL: tuple[Family, ...] = ("sdxl", "sdxl-refiner")
TASKS = {4: "text-to-image", 9: "inpainting", 8: "instructions", 5: "depth"}
SIZES = {"sdxl": 1024, "sdxl-refiner": 1024}  # in pixels; 512 for all else, but 768 for 2.x that predicts v
SCALING = {"sdxl": 0.13025, "sdxl-refiner": 0.13025}
IDS = {"sdxl": 6, "sdxl-refiner": 5}  # numbers that join the time
POOLED = 1280  # of OpenCLIP's largest text encoder, which XL's is
CLIP_NAMES = dict.fromkeys(("text_model",), "text_model") | {
    name: f"text_model.{name}" for name in ("embeddings", "encoder", "final_layer_norm")  # of the oldest files
}  # fmt: skip

# Tensors that no part takes, by how their names begin or end, and why.
LEFT = (
    ("model_ema.", "averaged weights of the U-Net, beside those that are read"),
    ("control_model.", "a ControlNet"),
    ("first_stage_model.loss.", "of the autoencoder's training"),
    ("loss.", "of the autoencoder's training"),
    ("v_pred", "a mark: v is predicted"),
    ("ztsnr", "a mark: the schedule ends at pure noise"),
)
# What some writers put beside a text encoder: of CLIP as a whole, or of a version without use for it.
UNUSED = ("logit_scale", "attn_mask", "text_projection.weight", "text_model.logit_scale")
SCHEDULE = ("alphas_cumprod", "betas", "log_one_minus_alphas_cumprod", "logvar", "posterior_", "sqrt_", "lvlb_weights")
SCHEDULE_TOO = ("denoiser.sigmas", "model_sampling.", "denoiser.log_sigmas")
FOREIGN = {
    "edm_mean": "Playground 2.5's schedule (edm_mean)",
    "edm_std": "Playground 2.5's schedule (edm_std)",
    "edm_vpred.sigma_max": "the schedule of CosXL (edm_vpred)",
}


@dataclass(frozen=True)
class Layout:
    """What a file is, and where each of its tensors goes.

    Arguments:
        family: sd1, sd2, sdxl, sdxl-refiner, or autoencoder for one alone.
        task: text-to-image, inpainting, instructions or depth.
        prediction: "eps" or "v".
        decided: By what the prediction was decided, in words.
        zero_snr: The schedule ends at pure noise.
        configs: The config.json of each part: "unet" and "vae" in diffusers' words, "text_encoder" and
            "text_encoder_2" in transformers'.
        rules: What becomes of each part's tensors. The names of a text encoder are those on the disk, with
            `text_model.` before them.
        left: Tensors that no part takes, and why.
        warnings: What a user should know.
    """

    family: Family
    task: str = "text-to-image"
    prediction: str = "eps"
    decided: str = ""
    zero_snr: bool = False
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    rules: dict[str, tuple[Rule, ...]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, dict[str, Shape]]:
        """The tensors of each part under their new names, with their shapes."""
        return {
            part: {name: shape for rule in rules for name, shape in rule.shapes.items()}
            for part, rules in self.rules.items()
        }

    @property
    def averaged(self) -> tuple[Rule, ...]:
        """The rules of the U-Net's averaged weights; none where the file has not all of them."""
        rules = tuple(replace(rule, old=average_name(rule.old)) for rule in self.rules.get("unet", ()))
        return rules if all(rule.old in self.left for rule in rules) else ()


def average_name(name: str) -> str:
    """Return what the averaged copy of a tensor of the U-Net is called.

    Example:
        >>> average_name("model.diffusion_model.out.2.bias")
        'model_ema.diffusion_modelout2bias'
    """
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def describe(shapes: Shapes, metadata: Mapping[str, str] | None = None) -> Layout | None:
    """Return what a file is; None where its names are not of this layout.

    Arguments:
        shapes: The shape of each of its tensors.
        metadata: What its header says beside them.

    Raises:
        ModelFileError: It is of this layout, and not put together as any Stable Diffusion that is known.

    Example:
        >>> describe({"conv_in.weight": (320, 4, 3, 3)}) is None
        True
    """
    unet, bare = under(shapes, UNET), "decoder.up.0.block.0.norm1.weight" in shapes
    vae = shapes if bare else under(shapes, VAE)
    if "input_blocks.0.0.weight" not in unet and not ("decoder.conv_in.weight" in vae and not unet):
        return None
    if found := [what for name, what in FOREIGN.items() if name in shapes]:
        raise ModelFileError(f"the file has {found[0]}, which is not supported")
    plan = unet_names.read_plan(unet) if unet else None
    family: Family = "autoencoder" if plan is None else recognise(shapes, unet, plan)
    layout = Layout(family)
    texts = {}
    for prefix, (part, open_clip) in TEXTS[family].items():
        if held := under(shapes, prefix):
            rules = text_rules(held, prefix, open_clip, family)
            texts[part] = text_names.config(
                {name: shape for rule in rules for name, shape in rule.shapes.items()}, open_clip
            )
            layout.rules[part] = rules
    if vae:
        vae = {name: shape for name, shape in vae.items() if reason(name, "") is None}
        levels, layers = autoencoder_names.read_plan(vae)
        names = autoencoder_names.table(len(levels), layers)
        layout.rules["vae"] = made(vae, "" if bare else VAE, names, autoencoder_names.form)
        layout.configs["vae"] = autoencoder_names.config(vae, SCALING.get(family, 0.18215))
    layout.configs.update(texts)
    if plan is not None:
        names = unet_names.table([bool(d) for d in plan.depths], plan.layers)
        layout.rules["unet"] = made(unet, UNET, names, same)
        added = joined(unet, family, texts)
        layout.configs["unet"] = unet_names.config(plan, unet, added)
        layout = said(layout, shapes, metadata or {})
    return replace(trained_at(layout), left=leftovers(layout, shapes))


def under(shapes: Shapes, prefix: str) -> dict[str, Shape]:
    """Return the shapes of the names that begin so, without that beginning."""
    return {name[len(prefix) :]: tuple(shape) for name, shape in shapes.items() if name.startswith(prefix)}


def recognise(shapes: Shapes, unet: Shapes, plan: unet_names.Plan) -> Family:
    """Return which Stable Diffusion a U-Net is of."""
    if "label_emb.weight" in unet:
        raise ModelFileError("it is an upscaler of Stable Diffusion, or has classes, which is not supported")
    joins = "label_emb.0.0.weight" in unet
    if not joins:
        return "sd2" if plan.linear else "sd1"
    if plan.depths[0] or not plan.linear:
        raise ModelFileError("it is an unCLIP of Stable Diffusion, conditioned by an image, which is not supported")
    base, refiner = (any(under(shapes, prefix) for prefix in TEXTS[name]) for name in XL)
    if base != refiner:
        return "sdxl" if base else "sdxl-refiner"
    return "sdxl-refiner" if len(plan.channels) == 4 else "sdxl"


def joined(unet: Shapes, family: Family, texts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what joins the time of XL, in diffusers' words."""
    if family not in IDS:
        return {}
    total = sized(unet, "label_emb.0.0.weight", 2)[1]
    pooled = texts["text_encoder_2"]["projection_dim"] if "text_encoder_2" in texts else POOLED
    each, over = divmod(total - pooled, IDS[family])
    if each < 2 or over:
        raise ModelFileError(
            f"its U-Net is told {total} numbers beside the text, which are not {pooled} and {IDS[family]} times as many"
        )
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": each,
        "projection_class_embeddings_input_dim": total,
    }


def said(layout: Layout, shapes: Shapes, metadata: Mapping[str, str]) -> Layout:
    """Return a layout with its task, and what its network predicts."""
    channels = layout.configs["unet"]["in_channels"]
    task = TASKS.get(channels)
    if task is None:
        known = ", ".join(map(str, TASKS))
        raise ModelFileError(f"its U-Net takes {channels} channels; Stable Diffusion's take {known}")
    told = str(metadata.get("modelspec.prediction_type", "")).lower()
    prediction, decided = "eps", "the family"
    warnings: tuple[str, ...] = ()
    if told in ("v", "v_prediction", "v-prediction", "epsilon", "eps"):
        prediction, decided = "v" if told.startswith("v") else "eps", "modelspec.prediction_type in the header"
    elif "v_pred" in shapes:
        prediction, decided = "v", "the tensor v_pred"
    elif layout.family == "sd2" and task == "text-to-image":
        prediction, decided = "v", "a guess"
        warnings = ("v is assumed of this 2.x; the base of 512 pixels, which has the same tensors, predicts eps",)
    layout.configs["unet"]["upcast_attention"] = layout.family == "sd2"
    return replace(
        layout, task=task, prediction=prediction, decided=decided, zero_snr="ztsnr" in shapes, warnings=warnings
    )


def trained_at(layout: Layout) -> Layout:
    """Return a layout whose configs say the size that the model was trained at."""
    size = SIZES.get(layout.family, 768 if layout.family == "sd2" and layout.prediction == "v" else 512)
    for part, config in layout.configs.items():
        if part in ("unet", "vae"):
            factor = 2 ** (len(layout.configs["vae"]["block_out_channels"]) - 1) if "vae" in layout.configs else 8
            config["sample_size"] = size // factor if part == "unet" else size
    return layout


# Rules ----------------------------------------------------------------------------------------------


def same(name: str, shape: Shape) -> Form:
    """Return what becomes of a tensor that keeps its form."""
    return "same"


def made(shapes: Shapes, prefix: str, table: Mapping[str, str], form: Callable[[str, Shape], Form]) -> tuple[Rule, ...]:
    """Return the rules of a part, whose names have lost their prefix.

    Raises:
        ModelFileError: A name has no place.
    """
    rules, unknown, seen = [], [], dict[str, str]()
    for name, shape in shapes.items():
        if reason(name, prefix) is not None:
            continue
        new, kind = renamed(name, table), form(name, tuple(shape))
        if new is None or ("{}" in new) != (kind == "thirds"):
            unknown.append(prefix + name)
            continue
        names = tuple(new.replace("{}", part) for part in "qkv") if kind == "thirds" else (new,)
        rules.append(Rule(prefix + name, tuple(shape), names, kind))
        for each in names:
            if each in seen:
                raise ModelFileError(f"{prefix}{seen[each]} and {prefix}{name} are the same tensor; use another file")
            seen[each] = name
    if unknown:
        raise ModelFileError(
            f"{len(unknown)} tensors have no place in Stable Diffusion: {', '.join(unknown[:3])}; "
            "it is another model, or a changed one"
        )
    return tuple(rules)


def text_rules(held: Shapes, prefix: str, open_clip: bool, family: Family) -> tuple[Rule, ...]:
    """Return the rules of a text encoder, whose names have lost their prefix."""
    held = {name: shape for name, shape in held.items() if name not in UNUSED}
    if not open_clip:
        return made(held, prefix, CLIP_NAMES, same)
    layers = text_names.open_layers(held)
    unused = family == "sd2" and "text_projection" in held and layers > 1
    last = f"transformer.resblocks.{layers - 1}."
    kept = {n: s for n, s in held.items() if not (unused and (n == "text_projection" or n.startswith(last)))}
    return made(kept, prefix, text_names.open_table(layers), lambda name, _: text_names.open_form(name))


def reason(name: str, prefix: str) -> str | None:
    """Return why a tensor is left out whatever the part; None where it is not."""
    if name.endswith("position_ids"):
        return "positions, counted from 0"
    full = prefix + name
    if full.startswith(SCHEDULE + SCHEDULE_TOO) or full == "log_one_minus_alphas_cumprod":
        return "what the schedule implies"
    return next((why for start, why in LEFT if full.startswith(start)), None)


def leftovers(layout: Layout, shapes: Shapes) -> dict[str, str]:
    """Return the tensors that no rule takes, with why."""
    taken = {rule.old for rules in layout.rules.values() for rule in rules}
    left = {}
    for name in shapes:
        if name in taken:
            continue
        why = reason(name, "")
        if why is None and name.startswith(("cond_stage_model.", "conditioner.")):
            why = "of the text encoder, unused by the U-Net"
        left[name] = why or "not known"
    return left
