"""Trains the bundled Whisper from scratch: openai-whisper's own modules on the synthetic corpus.

    python -m calibration.mini_whisper --corpus out/corpus --out out/mini

Three things make it learn in an hour on two cores: (1) a phoneme classifier on the encoder's frames,
because the synthesiser knows the exact phoneme times; (2) guided attention: one head of every decoder block
is pulled towards the frames of the word being written (the same heads are the model's alignment heads
afterwards); (3) Muon for the matrices of the blocks. Both auxiliary losses fade; the shipped model is a
plain whisper.Whisper.

Checkpoints are written every few minutes; the same command resumes, and sees the batches that an unbroken
run would see.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm
from whisper.model import ModelDimensions, Whisper

from calibration.windows import IGNORE, N_CTX, Vocabulary, WindowDataset

logger = logging.getLogger("whisper_steer")
FULL_VOCABULARY = 51_864
CHECKPOINT_SECONDS = 180
PHASES = [(0.45, (0.8, 0.12, 0.08)), (0.75, (0.55, 0.2, 0.25)), (1.0, (0.25, 0.2, 0.55))]


@dataclass(frozen=True)
class Recipe:
    """What is trained and how; saved with the model."""

    d_model: int = 192
    heads: int = 3  # 64 wide, as in every Whisper
    encoder_blocks: int = 4
    decoder_blocks: int = 2
    seed: int = 1
    steps: int = 2600
    warmup: int = 200
    lr_matrices: float = 2.5e-3  # Muon, scaled to match AdamW's root mean square
    lr_rest: float = 1.5e-3  # AdamW: embeddings, convolutions, biases, norms, heads
    weight_decay: float = 0.02
    phone_weight: float = 0.6
    attention_weight: float = 0.3
    final_auxiliary: float = 0.15  # share of the auxiliary weights that is left at the end

    def dims(self, n_vocab: int) -> ModelDimensions:
        return ModelDimensions(
            80,
            N_CTX,
            self.d_model,
            self.heads,
            self.encoder_blocks,
            n_vocab,
            448,
            self.d_model,
            self.heads,
            self.decoder_blocks,
        )


class Trainee(nn.Module):
    """A Whisper whose token embedding holds the trained rows plus the shared row (last), and a phoneme
    head."""

    def __init__(self, recipe: Recipe, vocabulary: Vocabulary, phonemes: int) -> None:
        super().__init__()
        self.whisper = Whisper(recipe.dims(len(vocabulary.ids) + 1))
        self.phone_head = nn.Linear(recipe.d_model, phonemes)
        self.shared_bonus = math.log(
            FULL_VOCABULARY - len(vocabulary.ids)
        )  # that many equal logits in the full softmax
        for name, parameter in self.whisper.named_parameters():
            if name.endswith("positional_embedding"):
                nn.init.normal_(parameter, std=0.01)
            elif "token_embedding" in name:
                nn.init.normal_(parameter, std=0.03)
            elif name.endswith(("out.weight", "mlp.2.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * recipe.encoder_blocks))

    def encode(self, mel: Tensor, offset: Tensor) -> Tensor:
        """mel (batch, 80, 2 * frames), offset (batch,) -> (batch, frames, d). AudioEncoder.forward for any
        part of the 30 s."""
        encoder = self.whisper.encoder
        x = F.gelu(encoder.conv1(mel))
        x = F.gelu(encoder.conv2(x)).permute(0, 2, 1)
        where = offset[:, None] + torch.arange(x.shape[1], device=x.device)
        x = x.float() + encoder.positional_embedding[where]
        for block in encoder.blocks:
            x = block(x)
        return encoder.ln_post(x)

    def decode(self, tokens: Tensor, audio: Tensor, spans: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (batch, length), audio (batch, frames, d), spans (batch, length, 2) -> logits (batch,
        length, rows) and the guided-attention loss, -log of the attention that head 0 of each block gives
        to the word's frames."""
        decoder = self.whisper.decoder
        x = decoder.token_embedding(tokens) + decoder.positional_embedding[: tokens.shape[1]]
        frames = torch.arange(audio.shape[1], device=audio.device)
        inside = (frames >= spans[..., :1] - 2) & (frames <= spans[..., 1:] + 2)
        guided = spans[..., 0] >= 0
        loss = x.new_zeros(())
        for block in decoder.blocks:
            x = x + block.attn(block.attn_ln(x), mask=decoder.mask)[0]
            h = block.cross_attn_ln(x)
            x = x + block.cross_attn(h, audio)[0]
            loss = loss + _guidance(block.cross_attn, h, audio, inside, guided)
            x = x + block.mlp(block.mlp_ln(x))
        logits = F.linear(decoder.ln(x), decoder.token_embedding.weight).float()
        logits = torch.cat([logits[..., :-1], logits[..., -1:] + self.shared_bonus], -1)
        return logits, loss / len(decoder.blocks)

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        audio = self.encode(batch["mel"], batch["offset"])
        logits, attention = self.decode(batch["tokens"], audio, batch["spans"])
        targets = batch["targets"]
        phones = self.phone_head(audio).float()
        known = targets != IGNORE
        return {
            "text": F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE),
            "attention": attention.float(),
            "phones": F.cross_entropy(phones.flatten(0, 1), batch["phones"].flatten(), ignore_index=IGNORE),
            "accuracy": (logits.detach().argmax(-1) == targets)[known].float().mean(),
        }


def _guidance(attention: nn.Module, h: Tensor, audio: Tensor, inside: Tensor, guided: Tensor) -> Tensor:
    """-log attention mass of head 0 inside the word's frames, averaged over guided targets."""
    width = h.shape[-1] // attention.n_head  # type: ignore[operator]
    q = F.linear(h, attention.query.weight[:width], attention.query.bias[:width])  # type: ignore[union-attr,index]
    k = F.linear(audio, attention.key.weight[:width])  # type: ignore[union-attr,index]
    scores = (q @ k.transpose(1, 2)).float() / math.sqrt(width)
    mass = torch.logsumexp(scores.masked_fill(~inside, -1e4), -1) - torch.logsumexp(scores, -1)
    return -(mass * guided).sum() / guided.sum().clamp(min=1)


class _From(Sampler):
    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.last))

    def __len__(self) -> int:
        return self.last - self.first


def _optimizers(trainee: Trainee, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in trainee.named_parameters():
        (matrices if parameter.ndim == 2 and ".blocks." in name else rest).append(parameter)
    return [
        torch.optim.Muon(
            matrices,
            lr=recipe.lr_matrices,
            weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
            ns_steps=4,
        ),
        torch.optim.AdamW(rest, lr=recipe.lr_rest, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def learning_rate(progress: float, step: int, warmup: int) -> float:
    """Factor in 0..1: linear warm-up, flat until 40 % of the training, then a cosine to 2 %."""
    rise = min(1.0, (step + 1) / warmup)
    fall = max(0.0, (progress - 0.4) / 0.6)
    return rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, fall))))


def _save(path: Path, state: dict) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def train(corpus: Path, out: Path, recipe: Recipe, device: str, workers: int) -> None:
    """Trains or resumes; leaves out/checkpoint.pt and a log of losses in out/log.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    data = WindowDataset(corpus, recipe.seed, recipe.steps, PHASES)
    trainee = Trainee(recipe, data.vocabulary, len(data.phonemes)).to(device)
    optimizers = _optimizers(trainee, recipe)
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    checkpoint, first, spent = out / "checkpoint.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        trainee.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, spent = state["step"], state["seconds"]
        print(f"resuming at step {first}", file=sys.stderr)
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=_From(first, recipe.steps),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        multiprocessing_context="fork" if workers else None,
    )
    started, saved_at, count = time.monotonic() - spent, time.monotonic(), 0
    sums: dict[str, float] = {}
    bar = tqdm(loader, initial=first, total=recipe.steps, unit="step", file=sys.stderr, mininterval=5)
    for step, batch in enumerate(bar, first):
        progress = step / recipe.steps
        factor = learning_rate(progress, step, recipe.warmup)
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(device, torch.bfloat16):
            losses = trainee.losses(batch)
        fade = 1 - (1 - recipe.final_auxiliary) * progress
        total = (
            losses["text"]
            + fade * recipe.phone_weight * losses["phones"]
            + fade * recipe.attention_weight * losses["attention"]
        )
        total.backward()
        nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
        count += 1
        if count == 50:
            means = {name: round(value / count, 4) for name, value in sums.items()}
            with (out / "log.jsonl").open("a") as log:
                log.write(
                    json.dumps(
                        {
                            "step": step + 1,
                            "seconds": round(time.monotonic() - started),
                            "lr": round(factor, 4),
                        }
                        | means
                    )
                    + "\n"
                )
            bar.set_postfix(means, refresh=False)
            sums, count = {}, 0
        done = step + 1 == recipe.steps
        if done or time.monotonic() - saved_at >= CHECKPOINT_SECONDS:
            saved_at = time.monotonic()
            _save(
                checkpoint,
                {
                    "step": step + 1,
                    "seconds": time.monotonic() - started,
                    "recipe": asdict(recipe),
                    "model": trainee.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "ids": list(data.vocabulary.ids),
                    "phonemes": data.phonemes,
                    "done": done,
                },
            )
    bar.close()
    print(f"{checkpoint}: {step + 1} steps, {(time.monotonic() - started) / 60:.1f} min")


def full_whisper(checkpoint: Path) -> tuple[Whisper, list[int], dict]:
    """The checkpoint as a true whisper.Whisper with all 51,864 tokens; the ids of the trained rows; the
    recipe."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    recipe, ids = Recipe(**state["recipe"]), state["ids"]
    model = Whisper(recipe.dims(FULL_VOCABULARY))
    weights = {name[8:]: value for name, value in state["model"].items() if name.startswith("whisper.")}
    rows = weights.pop("decoder.token_embedding.weight")
    embedding = rows[-1].expand(FULL_VOCABULARY, -1).clone()
    embedding[ids] = rows[:-1]
    weights["decoder.token_embedding.weight"] = embedding
    model.load_state_dict(weights)
    heads = torch.zeros(recipe.decoder_blocks, recipe.heads, dtype=torch.bool)
    heads[:, 0] = True  # the guided ones
    model.register_buffer("alignment_heads", heads.to_sparse(), persistent=False)
    model.eval().requires_grad_(False)
    return model, ids, state["recipe"] | {"step": state["step"], "seconds": state["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the bundled Whisper.")
    parser.add_argument("--corpus", type=Path, default=Path("out/corpus"))
    parser.add_argument("--out", type=Path, default=Path("out/mini"))
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    recipe = Recipe(seed=options.seed, steps=options.steps)
    train(options.corpus, options.out, recipe, options.device, options.workers)


if __name__ == "__main__":
    main()
