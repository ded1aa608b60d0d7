r"""What CLIP's text encoders make of a prompt, as Stable Diffusion was trained on it.

    SD 1, SD 2:  context = norm(h_last)                                                                       (1)
    SDXL:        context = [h_{last-1} of the first, h_{last-1} of the second],  pooled = W h_end             (2)

with `skip` layers left out before that, and emphasis put on the context's rows: each is multiplied by its weight
and all are scaled so that their mean stays,

    z <- z w,    z <- z mean(z before) / mean(z after).                                                        (3)

References:
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022)
    https://arxiv.org/abs/2112.10752
    SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis (Podell et al., 2023), section 2
    https://arxiv.org/abs/2307.01952
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reverie.models.card import ClipSpec
from reverie.models.clip_tokens import Chunk, Tokens
from reverie.models.conditioning import Conditioner


class ClipConditioner(Conditioner):
    """CLIP's text encoders with their tokenizers.

    Arguments:
        spec: What of the encoders the network is given.
        encoders: transformers' CLIPTextModel, or of SDXL that and a CLIPTextModelWithProjection.
        tokens: A tokenizer for each.
        skip: Last layers that are left out ("clip skip", counted from 0).
        read: Reads the encoders anew; None where they can't be let go.
    """

    def __init__(
        self,
        spec: ClipSpec,
        encoders: Sequence[nn.Module],
        tokens: Sequence[Tokens],
        skip: int = 0,
        read: Callable[[], Sequence[nn.Module]] | None = None,
    ) -> None:
        self.spec, self.tokens, self.skip, self.read = spec, list(tokens), skip, read
        self.device = torch.device("cpu")
        self.held: list[nn.Module] | None = [frozen(encoder) for encoder in encoders]

    @property
    def encoders(self) -> list[nn.Module]:
        """The encoders, read again where they were let go.

        Raises:
            ModelFileError: Their files are not what they were.
        """
        if self.held is None:
            assert self.read is not None
            self.held = [frozen(encoder).to(self.device) for encoder in self.read()]
        return self.held

    def keep(self) -> None:
        """Never let the encoders go: they are no longer what their files hold."""
        self.read = None

    def rest(self) -> None:
        if self.rests and self.read is not None:
            self.held = None

    def length(self, prompt: str) -> int:
        """Return how many chunks a prompt needs."""
        return max(len(tokens.chunks(prompt)) for tokens in self.tokens)

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], size: tuple[int, int] = (0, 0), chunks: int = 1, nothing: bool = False
    ) -> dict[str, Tensor]:
        alone = {prompt: self.one(prompt, chunks, nothing) for prompt in dict.fromkeys(prompts)}
        told = {name: torch.cat([alone[p][name] for p in prompts]) for name in alone[prompts[0]]}
        if self.spec.family == "sdxl":
            # The size that it was, where it was cropped, and the size that it is to be, in pixels.
            ids = torch.tensor([*size, 0, 0, *size], dtype=torch.float32)
            told["sizes"] = ids.expand(len(prompts), -1).to(told["context"].device)
        return told

    def one(self, prompt: str, chunks: int, nothing: bool) -> dict[str, Tensor]:
        """Return what one prompt is, rows (1, ...)."""
        parts = [
            self.contexts(encoder, tokens.chunks(prompt, chunks))
            for encoder, tokens in zip(self.encoders, self.tokens, strict=True)
        ]
        told = {"context": torch.cat([context for context, _ in parts], -1)}
        if self.spec.family == "sdxl":
            told["pooled"] = parts[-1][1]
        if nothing and not prompt and self.spec.zero_empty:
            return {name: torch.zeros_like(value) for name, value in told.items()}
        return told

    def contexts(
        self, encoder: nn.Module, chunks: Sequence[Chunk]
    ) -> tuple[Float[Tensor, "1 n d"], Float[Tensor, "1 p"]]:
        """Return the context (1, n, D) of a prompt's chunks, one after the other, and the first one's pooled (1, p)."""
        read = [self.look(encoder, chunk) for chunk in chunks]
        return torch.cat([context for context, _ in read], 1), read[0][1]

    def look(self, encoder: nn.Module, chunk: Chunk) -> tuple[Float[Tensor, "1 n d"], Float[Tensor, "1 p"]]:
        """Return the context (1, places, D) of one chunk, and what is pooled of it (1, p)."""
        device = next(encoder.parameters()).device
        out: Any = encoder(torch.tensor([chunk.tokens], device=device), output_hidden_states=True)
        context = self.layer(encoder, out)
        if any(weight != 1 for weight in chunk.weights):
            before = context.mean()
            context = context * torch.tensor(chunk.weights, device=device)[:, None]
            context = context * (before / context.mean())
        return context.float(), out.text_embeds if "text_embeds" in out else context[:, 0]

    def layer(self, encoder: nn.Module, out: Any) -> Tensor:
        """Return the layer that is the context: (1) or (2)."""
        if self.spec.family == "sdxl":
            return out.hidden_states[-2 - self.skip]
        if not self.skip:
            return out.last_hidden_state
        inner: Any = getattr(encoder, "text_model", encoder)
        return inner.final_layer_norm(out.hidden_states[-1 - self.skip])

    def remarks(self, prompt: str) -> list[str]:
        tokens = self.tokens[0]
        count, chunks = tokens.count(prompt), self.length(prompt)
        if chunks == 1:
            return []
        return [f"the prompt has {count} tokens and the encoder {tokens.places - 2} places: read in {chunks} chunks"]

    def to(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        for encoder in self.held or ():
            encoder.to(device)


def frozen(encoder: nn.Module) -> nn.Module:
    """Return an encoder that is not trained."""
    return encoder.eval().requires_grad_(False)
