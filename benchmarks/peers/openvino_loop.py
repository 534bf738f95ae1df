"""OpenVINO GenAI: a worker of bench_cpu_peers.py.

python openvino_loop.py FOLDER THREADS CONTEXT [lookup]      # or a GGUF file of a type that OpenVINO reads
"""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter
from typing import Any

from protocol import Answer, serve


def make(where: str, threads: int, lookup: bool) -> tuple[dict[str, Any], Answer]:
    import numpy as np
    import openvino
    import openvino_genai

    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
    if lookup:
        settings["prompt_lookup"] = True
    pipeline = openvino_genai.LLMPipeline(where, "CPU", **settings)
    config = openvino_genai.GenerationConfig()
    config.ignore_eos, config.do_sample = True, False
    if lookup:
        config.num_assistant_tokens, config.max_ngram_size = 10, 3

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        config.max_new_tokens = request["new"]
        prompt = openvino.Tensor(np.array([request["ids"]], dtype=np.int64))
        began = perf_counter()
        result = pipeline.generate(prompt, config)
        seconds = perf_counter() - began
        first = result.perf_metrics.get_ttft().mean / 1000
        return {"ids": [int(token) for token in result.tokens[0]], "seconds": seconds, "first": first}

    path = Path(where)
    weights = path / "openvino_model.bin" if path.is_dir() else path
    return {"bytes": weights.stat().st_size, "version": openvino.__version__}, answer


if __name__ == "__main__":
    folder, threads, _, *more = sys.argv[1:]
    serve(lambda: make(folder, int(threads), "lookup" in more))
