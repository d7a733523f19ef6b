"""CLIP as methods see it: open_clip's models behind one surface, whatever their image tower.

Two families of image towers are known: open_clip's own `VisionTransformer`, and timm's ViT inside
open_clip's `TimmModel`. The text tower is open_clip's causal transformer with CLIP's vocabulary.
Nothing here touches the network: the vocabulary is part of open_clip, weights are loaded elsewhere.

Shapes: B images, N texts, S context length (77), W width of the text tower, V width of the image
tower, E joint width, L prompt length.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from graftwork.methods.networks import vit as seams

VOCABULARY = 49408
"""Tokens of CLIP's byte pair encoding; the last one ends a text, the one before starts it."""


class Clip(nn.Module):
    """An open_clip model with two towers into one space.

    Args:
        model: `open_clip.CLIP` or `open_clip.CustomTextCLIP`; kept, not copied.

    Raises:
        TypeError: towers of another family.
    """

    model: Any
    """Typed by what `check` found, not by open_clip, which is an extra."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = check(model)

    @property
    def num_features(self) -> int:
        """E."""
        projection = self._text.text_projection
        return int(
            projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]
        )

    @property
    def image_width(self) -> int:
        """V, the width of tokens that `image_with_prompt` takes."""
        visual = self.model.visual
        return int(visual.trunk.embed_dim if _in_timm(visual) else visual.conv1.out_channels)

    @property
    def text_width(self) -> int:
        """W, the width of the embeddings that `text_from` takes."""
        return int(self._text.token_embedding.embedding_dim)

    @property
    def context_length(self) -> int:
        """S, the number of tokens of a text with its start, end and padding."""
        return int(self.model.context_length)

    @property
    def logit_scale(self) -> Tensor:
        """Logarithm of the factor on cosines, a parameter."""
        return self.model.logit_scale

    @property
    def _text(self) -> Any:
        return _text_tower(self.model)

    def image(self, images: Tensor) -> Tensor:
        """Features [B, E] of normalised images [B, 3, h, w]; not of unit length."""
        return self.model.encode_image(images)

    def image_with_prompt(self, images: Tensor, prompt: Tensor) -> Tensor:
        """Features [B, E], read from a prompt that goes through the image tower with the patches.

        The prompt enters after the class token, where positions are added already and `ln_pre` is
        applied; the mean of what becomes of it is normalised and projected as the class token
        otherwise is. timm's towers normalise every token first, and then take the mean.

        Args:
            images: [B, 3, h, w], normalised.
            prompt: [1 or B, L, V], L at least 1.

        Raises:
            ValueError: a prompt without tokens.
        """
        if not prompt.shape[1]:
            raise ValueError(f"prompt: must hold at least one token, got {list(prompt.shape)}")
        visual = self.model.visual
        if _in_timm(visual):
            return _timm_prompted(visual, images, prompt)
        return _prompted(visual, images, prompt)

    def tokenise(self, texts: Sequence[str]) -> Tensor:
        """Tokens [N, S] int64 of texts, on the model's device; start, text, end, zeros.

        Raises:
            ValueError: a text is longer than the context; open_clip would cut it off.
        """
        tokeniser, length = _tokeniser(), self.context_length
        rows = torch.zeros(len(texts), length, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = [VOCABULARY - 2, *tokeniser.encode(text), VOCABULARY - 1]
            if len(ids) > length:
                raise ValueError(
                    f"text: must have at most {length} tokens, got {len(ids)} in {text[:60]!r}"
                )
            row[: len(ids)] = torch.tensor(ids)
        return rows.to(self.logit_scale.device)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [N, S, W] of tokens, before positions are added: what prompts replace."""
        return self._text.token_embedding(tokens)

    def text(self, tokens: Tensor) -> Tensor:
        """Features [N, E] of tokens [N, S]; not of unit length.

        Those of open_clip's `encode_text`; what is behind the last end of a text, which a causal
        tower never looks at, is not computed.
        """
        end = ends(tokens)
        return self.text_from(self.embed(tokens[:, : int(end.max()) + 1]), end)

    def text_from(self, embeddings: Tensor, end: Tensor) -> Tensor:
        """Features [N, E] of texts given as embeddings; `text` for those of `embed`.

        Gradients reach the embeddings through a frozen tower.

        Args:
            embeddings: [N, S, W], without positions; S may be smaller than the context.
            end: position [N] of the token that ends the text, see `ends`.
        """
        tower = self._text
        length = embeddings.shape[1]
        x = embeddings + tower.positional_embedding[:length]
        mask = tower.attn_mask[:length, :length]
        x = tower.ln_final(tower.transformer(x, attn_mask=mask))
        x = x[torch.arange(len(x), device=x.device), end]
        projection = tower.text_projection
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection

    def forward(self, images: Tensor) -> Tensor:
        """`image`."""
        return self.image(images)


def ends(tokens: Tensor) -> Tensor:
    """Position [N] of the token that ends each text of tokens [N, S]: the largest id."""
    return tokens.argmax(dim=-1)


def unit(features: Tensor) -> Tensor:
    """Features [..., E] float32, scaled to length 1."""
    return F.normalize(features.float(), dim=-1)


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """Cosines [B, C] float32 of features [B, E] and [C, E], of any length, also under autocast."""
    with torch.autocast(images.device.type, enabled=False):
        return unit(images) @ unit(texts).T


def phrases(names: Sequence[str], template: str) -> list[str]:
    """The names in a template with one `{}`; underscores in names become spaces."""
    return [template.replace("{}", name.replace("_", " ")) for name in names]


def class_texts(clip: Clip, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Text features [C, E] of unit length: the mean over templates of features of unit length."""
    parts = [unit(clip.text(clip.tokenise(phrases(names, t)))) for t in templates]
    return unit(torch.stack(parts).mean(dim=0))


def context_tokens(clip: Clip, names: Sequence[str], length: int) -> Tensor:
    """Tokens [C, S] of the names behind `length` places for a learned context, each with a dot."""
    return clip.tokenise(phrases(names, "X " * length + "{}."))


def text_with_context(clip: Clip, tokens: Tensor, context: Tensor) -> Tensor:
    """Features [C, E] of texts whose first places are taken by learned vectors.

    Args:
        tokens: [C, S] of `context_tokens`.
        context: [1 or C, L, W], L as given there.
    """
    end = ends(tokens)
    embedded = clip.embed(tokens[:, : int(end.max()) + 1])
    own = context.to(embedded.dtype).expand(len(tokens), -1, -1)
    embedded = torch.cat([embedded[:, :1], own, embedded[:, 1 + own.shape[1] :]], dim=1)
    return clip.text_from(embedded, end)


def check(model: nn.Module) -> nn.Module:
    """The model, as one that `Clip` fits.

    Raises:
        TypeError: it is no CLIP, or a tower is of a family without an adapter.
    """
    import open_clip
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer as OwnTower

    if type(model) not in (open_clip.CLIP, open_clip.CustomTextCLIP):
        raise TypeError(f"expected an open_clip CLIP, got {type(model).__name__}")
    visual: Any = model.visual
    if isinstance(visual, TimmModel):
        if not isinstance(visual.trunk, VisionTransformer):
            raise TypeError(f"image tower {type(visual.trunk).__name__} is no timm ViT")
        seams.check(visual.trunk)
    elif not isinstance(visual, OwnTower):
        raise TypeError(f"image tower {type(visual).__name__} is no ViT")
    elif visual.attn_pool is not None or visual.pool_type != "tok" or visual.output_tokens:
        raise TypeError("the image tower does not end in its class token")
    tower = _text_tower(model)
    pooled = getattr(tower, "pool_type", getattr(tower, "text_pool_type", None))
    plain = not getattr(tower, "use_pad_mask", False) and getattr(tower, "cls_emb", None) is None
    if pooled != "argmax" or not plain or getattr(tower, "attn_mask", None) is None:
        raise TypeError("the text tower is not CLIP's causal one that ends in the last token")
    if tower.text_projection is None:
        raise TypeError("the text tower has no projection into the joint space")
    if tower.token_embedding.num_embeddings != VOCABULARY:
        raise TypeError(
            f"the text tower has {tower.token_embedding.num_embeddings} tokens, not {VOCABULARY}"
        )
    if getattr(model, "logit_bias", None) is not None:
        raise TypeError("the model adds a bias to its logits, as SigLIP does")
    return model


def _text_tower(model: Any) -> Any:
    """The module that holds the text tower's parts; `open_clip.CLIP` holds them itself."""
    return model.text if hasattr(model, "text") else model


def _in_timm(visual: Any) -> bool:
    return hasattr(visual, "trunk")


def _prompted(visual: Any, images: Tensor, prompt: Tensor) -> Tensor:
    """`image_with_prompt` of open_clip's own tower."""
    tokens = visual._embeds(images)
    own = prompt.to(tokens.dtype).expand(len(tokens), -1, -1)
    tokens = visual.transformer(torch.cat([tokens[:, :1], own, tokens[:, 1:]], dim=1))
    return visual.ln_post(tokens[:, 1 : 1 + own.shape[1]].mean(dim=1)) @ visual.proj


def _timm_prompted(visual: Any, images: Tensor, prompt: Tensor) -> Tensor:
    """`image_with_prompt` of a timm ViT inside open_clip."""
    trunk, first = visual.trunk, visual.trunk.num_prefix_tokens
    tokens = seams.forward_tokens(trunk, images, prompt=prompt)
    mean = tokens[:, first : first + prompt.shape[1]].mean(dim=1)
    return visual.head(trunk.head(trunk.head_drop(trunk.fc_norm(mean))))


@lru_cache(maxsize=1)
def _tokeniser() -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()
