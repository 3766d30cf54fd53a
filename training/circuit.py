"""The reader's initial weights: a standard architecture with a copying circuit placed in its middle
layers.

From random weights a model of this size needs far more text than a CPU can process before it learns
retrieval. So a few weights start as a circuit that already retrieves; they are ordinary weights and
are trained like all others.

- Layer 1 gathers. By position alone (biases of q and k under rotary positions) its four heads
  attend to the previous token, to the one before it, and to windows of the last 8 and 20 tokens,
  and add short codes of those tokens in subspaces of their own: x = token + previous + one
  before + window. Frequent tokens count little in a window.
- Layers 4 to 6 match. They have no rotary positions, so distance does not matter. A query made of
  the last tokens and their window finds places whose *preceding* tokens and window are the same,
  and copies the token that stands there.
- Layer 3 matches nearby: the same circuit on the slow rotary frequencies, while the fast ones
  favour the last 100 tokens. An answer begins with the words of its question, not with those of the
  many facts that look alike.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SmolLM3Config, SmolLM3ForCausalLM
from transformers.models.smollm3.modeling_smollm3 import SmolLM3Attention

from training.vocabulary import Vocabulary

GATHER_LAYER = 1
NO_ROPE_LAYERS = (4, 5, 6, 9)
CODE = 32  # dimensions of a token's code
# Wanted attention over distance, one row per gathering head.
KERNELS = ((0.0, 1.0), (0.0, 0.0, 1.0), (1.0,) * 8, (1.0,) * 20)
NEAR = (0.0, *(math.exp(-distance / 40) for distance in range(150)))  # the same for nearby matches
KEY_STRENGTH = 4.0
# Weights of the token, the previous one and the window in each query. All include the token, since
# a window alone matches best with itself.
QUERIES = ((2.0, 1.4, 0.4), (2.0, 1.0, 0.5), (2.0, 0.8, 0.6), (2.0, 0.4, 0.8))
KEYS = ((1.0, 1.0, 0.5), (1.2, 0.8, 0.7))
SHARED = 0.6  # how much tokens have in common that differ only in case or a leading space
# Lengths of the parts of a token's vector.
CODE_SHARE = 0.5
TOPIC_SHARE = 0.5
OUTPUT_SHARE = 0.7
GATHERED = (
    0.13,
    0.1,
    0.15,
    0.4,
)  # scale of what each gathering head writes; windows are means and need more
RARE = 0.002  # tokens more frequent than this are less of a topic
TOKEN_NORM = 0.7  # length of a token embedding; the gathered codes get a similar length


@dataclass(frozen=True)
class Size:
    """The shape of a reader: widths and counts of a grouped-query decoder with 12 layers."""

    width: int
    head_dim: int
    mlp: int
    num_heads: int = 4
    num_kv_heads: int = 2
    num_layers: int = 12

    def config(self, vocab_size: int) -> SmolLM3Config:
        """A stock architecture: every other tool that knows it can run the reader."""
        return SmolLM3Config(
            vocab_size=vocab_size,
            hidden_size=self.width,
            intermediate_size=self.mlp,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=16384,
            attention_bias=True,
            tie_word_embeddings=True,
            no_rope_layers=[int(layer not in NO_ROPE_LAYERS) for layer in range(self.num_layers)],
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=2,
        )


SIZES = {
    "small": Size(width=192, head_dim=48, mlp=256),
    "large": Size(width=256, head_dim=64, mlp=512),
}


@dataclass(frozen=True)
class Match:
    """How a layer matches at first: sharpness of its attention, length of what it copies, nearby
    only or anywhere."""

    sharpness: float
    copy: float
    near: bool = False


MATCHES = {
    3: Match(1.8, 0.05, near=True),
    4: Match(1.8, 0.1),
    5: Match(2.0, 0.1),
    6: Match(2.2, 0.1),
}


@dataclass(frozen=True)
class Frames:
    """Orthonormal directions of the residual stream, (CODE, D) each: three parts of a token, three
    of its context."""

    code: Tensor  # which token it is
    topic: Tensor  # what the token is about; short for frequent tokens
    output: Tensor  # the code again; copies are written here, where no query, key or value reads
    previous: Tensor  # code of the previous token
    before: Tensor  # code of the token before that
    window: Tensor  # topics of the last tokens


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """`rows` orthonormal rows of length `columns` (or orthonormal columns where rows > columns)."""
    side = max(rows, columns)
    square: Tensor = torch.linalg.qr(torch.randn(side, side, generator=generator))[0]
    return square[:rows, :columns]


def build_model(size: Size, vocabulary: Vocabulary, seed: int = 0) -> SmolLM3ForCausalLM:
    """A fresh reader in fp32 with the circuit in place; the same seed gives the same weights."""
    torch.manual_seed(seed)
    model = SmolLM3ForCausalLM(size.config(len(vocabulary.stems)))
    generator = torch.Generator().manual_seed(seed)
    basis = _orthonormal(size.width, size.width, generator)
    frames = Frames(*basis[: 6 * CODE].view(6, CODE, -1))
    with torch.no_grad():
        vectors = _token_vectors(vocabulary, frames, generator)
        model.model.embed_tokens.weight.copy_(TOKEN_NORM * vectors)
        model.model.norm.weight.fill_(2.0)
        for layer in model.model.layers:  # all but the circuit starts with small outputs
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
        _place_gather(model, size, frames)
        for layer, match in MATCHES.items():
            _place_match(model.model.layers[layer].self_attn, size, frames, generator, match)
            if match.near:
                _place_nearness(model, layer, size)
    return model


def _token_vectors(vocabulary: Vocabulary, frames: Frames, generator: torch.Generator) -> Tensor:
    """Unit vectors of all tokens, (V, D).

    Tokens of one stem ("The", " the") share most of their code and topic; the topic of a frequent
    token is short.
    """
    own = torch.randn(2, len(vocabulary.stems), CODE, generator=generator)
    shared = torch.randn(2, len(vocabulary.stems), CODE, generator=generator)[:, vocabulary.stems]
    code, topic = F.normalize(math.sqrt(SHARED) * shared + math.sqrt(1 - SHARED) * own, dim=-1)
    topic *= (RARE / vocabulary.frequencies).sqrt().clamp(max=1.0)[:, None]
    vectors = (
        CODE_SHARE * code @ frames.code
        + TOPIC_SHARE * topic @ frames.topic
        + OUTPUT_SHARE * code @ frames.output
    )
    return F.normalize(vectors, dim=1)


def _fit_kernel(kernel: tuple[float, ...], inv_freq: Tensor, head_dim: int) -> Tensor:
    """The query bias whose attention to keys all equal to (KEY_STRENGTH, …, 0, …) follows `kernel`:
    (2 * frequencies,).

    Under rotary positions the score is linear in the query and depends on distance alone, so this
    is a convex fit.
    """
    distance = torch.arange(16384, dtype=torch.float64)
    angle = distance[:, None] * inv_freq.double()  # (16384, frequencies)
    seen = KEY_STRENGTH * torch.cat([angle.cos(), -angle.sin()], 1) / math.sqrt(head_dim)
    target = torch.zeros_like(distance)
    target[: len(kernel)] = torch.tensor(kernel, dtype=torch.float64) / sum(kernel)
    query = torch.zeros(2 * len(inv_freq), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([query], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = (
            1e-4 * query.square().sum() - (target * torch.log_softmax(seen @ query, 0)).sum()
        )
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return query.detach().float()


def _place_gather(model: SmolLM3ForCausalLM, size: Size, frames: Frames) -> None:
    attention = model.model.layers[GATHER_LAYER].self_attn
    dim = size.head_dim
    key = torch.cat([torch.full((dim // 2,), KEY_STRENGTH), torch.zeros(dim // 2)])
    inv_freq = model.model.rotary_emb.inv_freq
    attention.q_proj.bias.copy_(
        torch.cat([_fit_kernel(kernel, inv_freq, dim) for kernel in KERNELS])
    )
    attention.k_proj.bias.copy_(key.repeat(size.num_kv_heads))
    attention.q_proj.weight.mul_(0.2)
    attention.k_proj.weight.mul_(0.2)
    attention.v_proj.weight.zero_()
    attention.o_proj.weight.zero_()
    for group, code in enumerate((frames.code, frames.topic)):
        attention.v_proj.weight[group * dim : group * dim + CODE] = code
    targets = zip(
        (frames.previous, frames.before, frames.window, frames.window), GATHERED, strict=True
    )
    for head, (target, length) in enumerate(targets):
        attention.o_proj.weight[:, head * dim : head * dim + CODE] = target.T * length


def _near_dims(size: Size) -> list[int]:
    """The dimensions of a head whose rotary frequencies distinguish near from far: the faster two
    fifths."""
    half = size.head_dim // 2
    return [start + index for start in (0, half) for index in range(2 * half // 5)]


def _place_nearness(model: SmolLM3ForCausalLM, layer: int, size: Size) -> None:
    attention = model.model.layers[layer].self_attn
    dims = _near_dims(size)
    inv_freq = model.model.rotary_emb.inv_freq[: len(dims) // 2]
    query = torch.zeros(size.head_dim)
    key = torch.zeros(size.head_dim)
    query[dims] = _fit_kernel(NEAR, inv_freq, size.head_dim)
    key[dims[: len(dims) // 2]] = KEY_STRENGTH
    attention.q_proj.bias.copy_(query.repeat(size.num_heads))
    attention.k_proj.bias.copy_(key.repeat(size.num_kv_heads))


def _place_match(
    attention: SmolLM3Attention,
    size: Size,
    frames: Frames,
    generator: torch.Generator,
    match: Match,
) -> None:
    dim = size.head_dim
    free = [index for index in range(dim) if not match.near or index not in _near_dims(size)]
    spread = torch.zeros(3, dim, CODE)
    for part in spread:
        part[free] = _orthonormal(len(free), CODE, generator)
    last = (
        frames.code,
        frames.previous,
        frames.window,
    )  # what a query knows: token, previous, window
    ahead = (
        frames.previous,
        frames.before,
        frames.window,
    )  # the same three, seen from the place after

    def mix(parts: tuple[Tensor, Tensor, Tensor], weights: tuple[float, float, float]) -> Tensor:
        return match.sharpness * torch.stack(
            [w * s @ p for w, s, p in zip(weights, spread, parts, strict=True)]
        ).sum(0)

    attention.q_proj.weight.copy_(torch.cat([mix(last, weights) for weights in QUERIES]))
    attention.k_proj.weight.copy_(torch.cat([mix(ahead, weights) for weights in KEYS]))
    for group in range(size.num_kv_heads):
        attention.v_proj.weight[group * dim : group * dim + CODE] = frames.code
    for head in range(size.num_heads):
        attention.o_proj.weight[:, head * dim : head * dim + CODE] = frames.output.T * match.copy
