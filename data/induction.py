"""Starts an untrained Llama as an induction circuit: "find this token earlier, copy what follows".

Left to chance, a small model spends most of a short training on finding this circuit. Here layer 0
begins with heads that look one and two tokens back, and layer 1 with a head whose keys are what
the token before them said and whose output is what it sees. All of it is trained afterwards like
any other weight. Knows nothing about the corpus.
"""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

BACK_SHARPNESS = 0.8  # of the heads that look back; their margin is the square of it
MATCH_SHARPNESS = 4.0  # of the head that finds a token again
EMBEDDING_SCALE = 5.0  # embeddings are tied: larger ones let the copied token win from the start
WRITE_SCALE = 0.06 * EMBEDDING_SCALE
COPY_SCALE = 0.5 * EMBEDDING_SCALE
MAX_TURN = 0.01  # radians a token: slower rotary pairs hardly feel the distance


@torch.no_grad()
def install_induction(model: LlamaForCausalLM, hops: bool = False) -> None:
    """Overwrite the embeddings' mean and some heads of the first two layers, in place.

    A direction `common` is added to every embedding: heads that look at a distance only, not at
    a token, read their queries and keys from it. With `hops` every later layer matches too, and
    what one layer found is what the next one looks for.
    """
    embeddings = model.get_input_embeddings().weight
    width = embeddings.shape[1]
    common = torch.nn.functional.normalize(torch.randn(width), dim=0)
    embeddings *= EMBEDDING_SCALE
    norm = embeddings.norm(dim=1).mean()
    embeddings += torch.outer(norm - embeddings @ common, common)
    angles = model.model.rotary_emb.inv_freq
    head_dim = 2 * len(angles)

    def projection() -> torch.Tensor:
        """Return `head_dim` orthonormal rows, blind to the common direction."""
        rows = torch.randn(width, head_dim)
        rows -= torch.outer(common, common @ rows)
        basis: torch.Tensor = torch.linalg.qr(rows).Q
        return basis.T

    # Layer 0, heads 0 and 1 on key head 0. With RoPE a constant key (1, 0) and a constant query
    # turned back by `distance` score cos((i - j - distance) * angle): highest at that distance.
    back = model.model.layers[0].self_attn
    said = projection()
    back.v_proj.weight[:head_dim] = said
    slow = (angles < MAX_TURN).float()
    fast = 1 - slow
    ahead = torch.cat([fast, torch.zeros_like(fast)])
    back.k_proj.weight[:head_dim] = BACK_SHARPNESS * torch.outer(ahead, common)
    written = [WRITE_SCALE * projection() for _ in range(2)]
    for head, distance in enumerate((1, 2)):
        turn = angles * distance
        turned = torch.cat([fast * turn.cos(), -fast * turn.sin()])
        rows = slice(head * head_dim, (head + 1) * head_dim)
        back.q_proj.weight[rows] = BACK_SHARPNESS * torch.outer(turned, common)
        back.o_proj.weight[:, rows] = written[head].T

    # Layer 1, head 0: the query is the token itself, the key is the token that head 0 wrote.
    gain = MATCH_SHARPNESS * torch.cat([slow, slow])[:, None]
    seen = said if hops else projection()
    for layer in model.model.layers[1:] if hops else model.model.layers[1:2]:
        match = layer.self_attn
        match.q_proj.weight[:head_dim] = gain * said
        match.k_proj.weight[:head_dim] = gain * torch.nn.functional.normalize(written[0], dim=1)
        match.v_proj.weight[:head_dim] = seen
        match.o_proj.weight[:, :head_dim] = COPY_SCALE * seen.T
