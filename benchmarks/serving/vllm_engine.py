"""Run by others.py under an interpreter with vLLM: answers the loads that it reads, one a line, in process."""

import json
import sys
import time

from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

settings = json.loads(sys.argv[1])
adapters = settings["adapters"]
options = {}
if adapters:
    options = {
        "enable_lora": True,
        "max_loras": min(16, len(adapters)),
        "max_lora_rank": 64,
        "max_cpu_loras": max(16, len(adapters) + 1),
    }
engine = LLMEngine.from_engine_args(
    EngineArgs(
        model=settings["model"],
        dtype="float32",
        max_model_len=256,
        max_num_seqs=16,
        max_num_batched_tokens=256,
        enforce_eager=True,
        enable_prefix_caching=False,
        seed=0,
        **options,
    )
)
print("@{}", flush=True)
number = 0
for line in sys.stdin:
    plan = json.loads(line)
    began = time.perf_counter()
    left, running, told = list(enumerate(plan["asked"])), {}, [{} for _ in plan["asked"]]
    while left or running:
        if plan["together"] is None and not running:
            time.sleep(max(0.0, began + left[0][1]["arrival"] - time.perf_counter()))
        while left and (
            began + left[0][1]["arrival"] <= time.perf_counter()
            if plan["together"] is None
            else len(running) < plan["together"]
        ):
            i, one = left.pop(0)
            number += 1
            name = str(number)
            running[name] = i
            since = time.perf_counter() - began if plan["together"] is not None else one["arrival"]
            told[i] = {"submitted": since, "tokens": []}
            lora = None
            if one["adapter"] is not None:
                lora = LoRARequest(f"a{one['adapter']}", one["adapter"] + 1, adapters[one["adapter"]])
            sampling = SamplingParams(
                max_tokens=one["tokens"], min_tokens=one["tokens"], temperature=0.0, ignore_eos=True, detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )  # fmt: skip
            engine.add_request(name, {"prompt_token_ids": one["prompt"]}, sampling, lora_request=lora)
        outputs = engine.step()
        now = time.perf_counter() - began
        for output in outputs:
            mine = told[running[output.request_id]]
            mine["tokens"] += list(output.outputs[0].token_ids)
            mine.setdefault("first", now)
            if output.finished:
                mine["done"] = now
                del running[output.request_id]
    print("@" + json.dumps({"answers": told}), flush=True)
