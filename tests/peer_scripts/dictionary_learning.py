"""Saves one SAE of every class of dictionary_learning, loads it with load_dictionary and applies it."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import torch
from common import D, K, N, Results, randomise

# only language models need it, and it takes seconds to import
sys.modules["nnsight"] = ModuleType("nnsight")
sys.modules["nnsight"].LanguageModel = object  # type: ignore[attr-defined]
sys.path.pop(0)  # this folder holds a file of the library's name

from dictionary_learning import dictionary as classes  # noqa: E402
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # noqa: E402
from dictionary_learning.utils import load_dictionary  # noqa: E402

results = Results(sys.argv[1])
saes = {
    "AutoEncoderTopK": AutoEncoderTopK(D, N, K),
    "BatchTopKSAE": BatchTopKSAE(D, N, K),
    "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE(D, N, K, [32, 64]),
    "AutoEncoder": classes.AutoEncoder(D, N),
    "AutoEncoderNew": classes.AutoEncoderNew(D, N),
    "JumpReluAutoEncoder": classes.JumpReluAutoEncoder(D, N),
    "GatedAutoEncoder": classes.GatedAutoEncoder(D, N),
}
for seed, (name, sae) in enumerate(saes.items()):
    randomise(sae, seed)
    if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        sae.threshold.fill_(1.3)
    if name == "JumpReluAutoEncoder":
        sae.threshold.data.abs_()
    folder = results.made(name)
    torch.save(sae.state_dict(), folder / "ae.pt")
    trainer = {"dict_class": name, "layer": seed, "lm_name": "openai/whisper-small", "k": K}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    loaded, _ = load_dictionary(str(folder), device="cpu")
    with torch.no_grad():
        codes = loaded.encode(results.x)
        results.add(name, codes, loaded.decode(codes))
results.save()
