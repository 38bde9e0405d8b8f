"""Run by others.py under an interpreter with xllamacpp: starts llama.cpp's server, says where, ends with its input."""

import json
import sys

import xllamacpp

settings = json.loads(sys.argv[1])
parameters = xllamacpp.CommonParams()
parameters.model.path = settings["model"]
parameters.port = 0
parameters.n_parallel, parameters.n_ctx = 16, 16 * 256
parameters.n_batch = parameters.n_ubatch = 512
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = settings["threads"]
parameters.cache_prompt, parameters.cache_ram_mib, parameters.cont_batching = False, 0, True
parameters.warmup, parameters.verbosity, parameters.ui = True, 0, False
parameters.fit_params, parameters.n_ctx_checkpoints = False, 0
if settings["loras"]:
    parameters.lora_adapters = [
        xllamacpp.CommonAdapterLoraInfo(path=path, scale=1.0) for path in settings["loras"]
    ]
    parameters.lora_init_without_apply = True
server = xllamacpp.Server(parameters)
print(server.listening_address, flush=True)
sys.stdin.read()
