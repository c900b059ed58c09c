"""Write estimator/data/presets.jsonl: the published models that have a name, from their config.json files.

The files are rows of tests/data/hf/configs.jsonl and more.jsonl, each with its source; here stands only what each is
called. `python tools/hf_presets.py` writes the data again.
"""

import json
import re
from pathlib import Path

from estimator.describe.hf import read_config

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "tests" / "data" / "hf"
OUT = ROOT / "estimator" / "data" / "presets.jsonl"
DATE = "2026-11-26"  # when the files were read
# Fields that are left out where the model is the same without them.
NOISE = re.compile(
    r"_id$|_eps$|epsilon|dropout|pdrop|architectures|auto_map|dtype|transformers_version|initializer|init_|use_cache|"
    r"summary|task_specific|quantization|aux_loss|jitter|output_router|rope_theta|rope_scaling|rope_local|pretraining_tp|"
    r"tokenizer_class|cache_impl|_attn_impl|ep_size|nextn|verbose|seq_aux|mtp|chunk_size$|_size_mlc|slow_but|^unk|runner"
)

# What a model of one's own starts from, the first for its kind.
STARTS = ("gpt2-xl", "llama-3.2-1b")
# Group: row of the files -> (name of the preset, its names on the hub; further names that people use, after "|").
NAMES = {
    "GPT-2": {
        "distilgpt2": "distilgpt2 distilbert/distilgpt2",
        "gpt2": "gpt2 openai-community/gpt2 | gpt2-small",
        "gpt2-medium": "gpt2-medium openai-community/gpt2-medium",
        "gpt2-large": "gpt2-large openai-community/gpt2-large",
        "gpt2-xl": "gpt2-xl openai-community/gpt2-xl",
    },
    "Stanford CS336": {"cs336-tinystories": "cs336-tinystories"},
    "Llama 1": {
        "llama-30b": "llama-30b huggyllama/llama-30b",
        "llama-65b": "llama-65b huggyllama/llama-65b",
    },
    "Llama 2": {
        "llama-2-7b": "llama-2-7b meta-llama/Llama-2-7b-hf meta-llama/Llama-2-7b meta-llama/Llama-2-7b-chat-hf",
        "llama-2-13b": "llama-2-13b meta-llama/Llama-2-13b-hf meta-llama/Llama-2-13b meta-llama/Llama-2-13b-chat-hf",
        "llama-2-70b": "llama-2-70b meta-llama/Llama-2-70b-hf meta-llama/Llama-2-70b meta-llama/Llama-2-70b-chat-hf",
        "CodeLlama-7b-hf": "codellama-7b codellama/CodeLlama-7b-hf",
        "CodeLlama-34b-Instruct-hf": "codellama-34b codellama/CodeLlama-34b-Instruct-hf codellama/CodeLlama-34b-hf",
        "CodeLlama-70b-hf": "codellama-70b codellama/CodeLlama-70b-hf",
    },
    "Llama 3": {
        "llama-3-8b": (
            "llama-3-8b meta-llama/Meta-Llama-3-8B meta-llama/Llama-3-8B meta-llama/Meta-Llama-3-8B-Instruct"
        ),
        "llama-3-70b": (
            "llama-3-70b meta-llama/Meta-Llama-3-70B meta-llama/Llama-3-70B meta-llama/Meta-Llama-3-70B-Instruct"
        ),
        "llama-3.1-8b": (
            "llama-3.1-8b meta-llama/Llama-3.1-8B meta-llama/Meta-Llama-3.1-8B meta-llama/Llama-3.1-8B-Instruct"
        ),
        "llama-3.1-70b": (
            "llama-3.1-70b meta-llama/Llama-3.1-70B meta-llama/Meta-Llama-3.1-70B meta-llama/Llama-3.1-70B-Instruct"
        ),
        "llama-3.1-405b": (
            "llama-3.1-405b meta-llama/Llama-3.1-405B meta-llama/Meta-Llama-3.1-405B meta-llama/Llama-3.1-405B-Instruct"
        ),
        "llama-3.2-1b": "llama-3.2-1b meta-llama/Llama-3.2-1B meta-llama/Llama-3.2-1B-Instruct",
        "llama-3.2-3b": "llama-3.2-3b meta-llama/Llama-3.2-3B meta-llama/Llama-3.2-3B-Instruct",
        "Llama-3.3-70B-Instruct": "llama-3.3-70b meta-llama/Llama-3.3-70B-Instruct",
    },
    "Llama 4 (text part)": {
        "Llama-4-Scout-17B-16E-Instruct text part": "llama-4-scout-text | llama-4-scout llama-4-scout-17b-16e",
        "Llama-4-Maverick-17B-128E-Instruct text part": (
            "llama-4-maverick-text | llama-4-maverick llama-4-maverick-17b-128e"
        ),
    },
    "TinyLlama": {
        "tinyllama-1.1b": (
            "tinyllama-1.1b TinyLlama/TinyLlama_v1.1 TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T "
            "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
        ),
    },
    "SmolLM": {
        "SmolLM-135M": "smollm-135m HuggingFaceTB/SmolLM-135M",
        "SmolLM-360M": "smollm-360m HuggingFaceTB/SmolLM-360M",
        "SmolLM-1.7B": "smollm-1.7b HuggingFaceTB/SmolLM-1.7B",
        "smollm2-135m": "smollm2-135m HuggingFaceTB/SmolLM2-135M HuggingFaceTB/SmolLM2-135M-Instruct",
        "SmolLM3-3B": "smollm3-3b HuggingFaceTB/SmolLM3-3B HuggingFaceTB/SmolLM3-3B-Base | smollm3",
    },
    "Yi": {"Yi-34B": "yi-34b 01-ai/Yi-34B"},
    "Falcon": {
        "falcon-rw-1b": "falcon-rw-1b tiiuae/falcon-rw-1b",
        "falcon-7b (old spelling: n_layer, n_head)": "falcon-7b tiiuae/falcon-7b tiiuae/falcon-7b-instruct",
        "falcon-180B": "falcon-180b tiiuae/falcon-180B",
        "Falcon3-1B-Base": "falcon3-1b tiiuae/Falcon3-1B-Base",
        "Falcon3-3B-Base": "falcon3-3b tiiuae/Falcon3-3B-Base",
        "Falcon3-10B-Base": "falcon3-10b tiiuae/Falcon3-10B-Base",
    },
    "Salamandra": {
        "salamandra-2b": "salamandra-2b BSC-LT/salamandra-2b",
        "salamandra-7b": "salamandra-7b BSC-LT/salamandra-7b",
    },
    "Mistral": {
        "mistral-7b": "mistral-7b mistralai/Mistral-7B-v0.1 mistralai/Mistral-7B-Instruct-v0.1",
        "mistral-7b-v0.3": "mistral-7b-v0.3 mistralai/Mistral-7B-v0.3 mistralai/Mistral-7B-Instruct-v0.3",
        "Mistral-Nemo-Instruct-2407": (
            "mistral-nemo-12b mistralai/Mistral-Nemo-Instruct-2407 mistralai/Mistral-Nemo-Base-2407 | mistral-nemo"
        ),
        "Mistral-Small-24B-Base-2501": (
            "mistral-small-24b mistralai/Mistral-Small-24B-Base-2501 mistralai/Mistral-Small-24B-Instruct-2501"
        ),
        "Ministral-8B-Instruct-2410": "ministral-8b mistralai/Ministral-8B-Instruct-2410",
        "Devstral-2-123B-Instruct": "devstral-2-123b mistralai/Devstral-2-123B-Instruct-2512",
    },
    "Mixtral": {
        "Mixtral-8x7B-v0.1": "mixtral-8x7b mistralai/Mixtral-8x7B-v0.1 mistralai/Mixtral-8x7B-Instruct-v0.1",
        "Mixtral-8x22B-v0.1": "mixtral-8x22b mistralai/Mixtral-8x22B-v0.1",
    },
    "Qwen 1.5 and 2": {
        "Qwen1.5-0.5B": "qwen1.5-0.5b Qwen/Qwen1.5-0.5B",
        "Qwen1.5-1.8B": "qwen1.5-1.8b Qwen/Qwen1.5-1.8B",
        "Qwen1.5-4B": "qwen1.5-4b Qwen/Qwen1.5-4B",
        "Qwen1.5-14B": "qwen1.5-14b Qwen/Qwen1.5-14B",
        "Qwen1.5-32B": "qwen1.5-32b Qwen/Qwen1.5-32B",
        "Qwen1.5-72B": "qwen1.5-72b Qwen/Qwen1.5-72B",
        "Qwen1.5-MoE-A2.7B": "qwen1.5-moe-a2.7b Qwen/Qwen1.5-MoE-A2.7B",
        "Qwen2-0.5B": "qwen2-0.5b Qwen/Qwen2-0.5B",
        "Qwen2-57B-A14B": "qwen2-57b-a14b Qwen/Qwen2-57B-A14B",
    },
    "Qwen 2.5": {
        "qwen2.5-0.5b": "qwen2.5-0.5b Qwen/Qwen2.5-0.5B Qwen/Qwen2.5-0.5B-Instruct",
        "qwen2.5-1.5b": "qwen2.5-1.5b Qwen/Qwen2.5-1.5B",
        "qwen2.5-3b": "qwen2.5-3b Qwen/Qwen2.5-3B Qwen/Qwen2.5-3B-Instruct",
        "qwen2.5-7b": "qwen2.5-7b Qwen/Qwen2.5-7B",
        "qwen2.5-14b": "qwen2.5-14b Qwen/Qwen2.5-14B",
        "qwen2.5-32b": "qwen2.5-32b Qwen/Qwen2.5-32B",
        "qwen2.5-72b": "qwen2.5-72b Qwen/Qwen2.5-72B",
    },
    "Qwen 3": {
        "Qwen3-0.6B": "qwen3-0.6b Qwen/Qwen3-0.6B",
        "Qwen3-1.7B": "qwen3-1.7b Qwen/Qwen3-1.7B",
        "Qwen3-4B": "qwen3-4b Qwen/Qwen3-4B",
        "Qwen3-8B": "qwen3-8b Qwen/Qwen3-8B",
        "Qwen3-14B": "qwen3-14b Qwen/Qwen3-14B",
        "Qwen3-32B": "qwen3-32b Qwen/Qwen3-32B",
        "Qwen3-30B-A3B": "qwen3-30b-a3b Qwen/Qwen3-30B-A3B",
        "Qwen3-235B-A22B-Thinking-2507": (
            "qwen3-235b-a22b Qwen/Qwen3-235B-A22B-Thinking-2507 Qwen/Qwen3-235B-A22B-Instruct-2507"
        ),
        "Qwen3-Coder-480B-A35B-Instruct": "qwen3-coder-480b-a35b Qwen/Qwen3-Coder-480B-A35B-Instruct",
    },
    "Gemma": {
        "gemma-2b": "gemma-2b google/gemma-2b google/gemma-2b-it",
        "gemma-7b": "gemma-7b google/gemma-7b google/gemma-7b-it",
        "gemma-2-2b": "gemma-2-2b google/gemma-2-2b google/gemma-2-2b-it",
        "gemma-2-9b": "gemma-2-9b google/gemma-2-9b google/gemma-2-9b-it",
        "gemma-2-27b": "gemma-2-27b google/gemma-2-27b google/gemma-2-27b-it",
        "gemma-3-1b-it": "gemma-3-1b google/gemma-3-1b-it google/gemma-3-1b-pt",
        "gemma-3-4b text part": "gemma-3-4b-text | gemma-3-4b",
        "gemma-3-12b text part": "gemma-3-12b-text | gemma-3-12b",
        "gemma-3-27b text part": "gemma-3-27b-text | gemma-3-27b",
    },
    "DeepSeek": {
        "deepseek-moe-16b-base": "deepseek-moe-16b deepseek-ai/deepseek-moe-16b-base deepseek-ai/deepseek-moe-16b-chat",
        "DeepSeek-V2-Lite": "deepseek-v2-lite deepseek-ai/DeepSeek-V2-Lite",
        "DeepSeek-V3": "deepseek-v3 deepseek-ai/DeepSeek-V3 deepseek-ai/DeepSeek-V3-Base",
        "DeepSeek-R1": "deepseek-r1 deepseek-ai/DeepSeek-R1",
        "Kimi-K2-Instruct as deepseek_v3": "kimi-k2 moonshotai/Kimi-K2-Instruct",
    },
    "gpt-oss": {
        "gpt-oss-20b": "gpt-oss-20b openai/gpt-oss-20b",
        "gpt-oss-120b": "gpt-oss-120b openai/gpt-oss-120b",
    },
    "GLM": {
        "chatglm3-6b": "chatglm3-6b zai-org/chatglm3-6b THUDM/chatglm3-6b",
        "glm-4-9b": "glm-4-9b zai-org/glm-4-9b THUDM/glm-4-9b zai-org/glm-4-9b-chat THUDM/glm-4-9b-chat",
        "glm-edge-1.5b-chat": "glm-edge-1.5b zai-org/glm-edge-1.5b-chat",
        "GLM-4-32B-0414": "glm-4-32b zai-org/GLM-4-32B-0414",
        "GLM-4.5-Air": "glm-4.5-air zai-org/GLM-4.5-Air",
        "GLM-4.5": "glm-4.5 zai-org/GLM-4.5",
    },
    "OLMo": {
        "OLMo-1B-hf": "olmo-1b allenai/OLMo-1B-hf",
        "OLMo-2-1124-7B": "olmo-2-7b allenai/OLMo-2-1124-7B",
        "OLMo-2-0325-32B": "olmo-2-32b allenai/OLMo-2-0325-32B",
        "Olmo-3-7B": "olmo-3-7b allenai/Olmo-3-1025-7B",
        "OLMoE-1B-7B-0924": "olmoe-1b-7b allenai/OLMoE-1B-7B-0924",
    },
    "Phi": {
        "phi-1": "phi-1 microsoft/phi-1",
        "phi-2": "phi-2 microsoft/phi-2",
        "Phi-3-mini-4k-instruct": "phi-3-mini microsoft/Phi-3-mini-4k-instruct",
        "Phi-3.5-MoE-instruct": "phi-3.5-moe microsoft/Phi-3.5-MoE-instruct",
        "Phi-4-mini-instruct": "phi-4-mini microsoft/Phi-4-mini-instruct",
        "phi-4": "phi-4 microsoft/phi-4",
    },
    "Granite": {
        "granite-3.0-2b-base": "granite-3.0-2b ibm-granite/granite-3.0-2b-base",
        "granite-3.0-8b-base": "granite-3.0-8b ibm-granite/granite-3.0-8b-base",
        "granite-3.0-1b-a400m-base": "granite-3.0-1b-a400m ibm-granite/granite-3.0-1b-a400m-base",
        "granite-3.0-3b-a800m-base": "granite-3.0-3b-a800m ibm-granite/granite-3.0-3b-a800m-base",
    },
    "Pythia and GPT-NeoX": {
        "pythia-70m": "pythia-70m EleutherAI/pythia-70m EleutherAI/pythia-70m-deduped",
        "pythia-160m": "pythia-160m EleutherAI/pythia-160m EleutherAI/pythia-160m-deduped",
        "pythia-1b": "pythia-1b EleutherAI/pythia-1b EleutherAI/pythia-1b-deduped",
        "pythia-1.4b": "pythia-1.4b EleutherAI/pythia-1.4b EleutherAI/pythia-1.4b-deduped",
        "pythia-2.8b": "pythia-2.8b EleutherAI/pythia-2.8b EleutherAI/pythia-2.8b-deduped",
        "pythia-12b": "pythia-12b EleutherAI/pythia-12b EleutherAI/pythia-12b-deduped",
        "gpt-neox-20b": "gpt-neox-20b EleutherAI/gpt-neox-20b",
        "polyglot-ko-1.3b": "polyglot-ko-1.3b EleutherAI/polyglot-ko-1.3b",
        "RedPajama-INCITE-3B-v1": "redpajama-incite-3b togethercomputer/RedPajama-INCITE-Base-3B-v1",
    },
    "GPT-J and GPT-Neo": {
        "gpt-neo-125m": "gpt-neo-125m EleutherAI/gpt-neo-125m",
        "gpt-neo-1.3B": "gpt-neo-1.3b EleutherAI/gpt-neo-1.3B",
        "gpt-neo-2.7B": "gpt-neo-2.7b EleutherAI/gpt-neo-2.7B",
        "gpt-j-6b": "gpt-j-6b EleutherAI/gpt-j-6b",
    },
    "OPT": {
        "opt-125m": "opt-125m facebook/opt-125m",
        "opt-350m": "opt-350m facebook/opt-350m",
        "opt-1.3b": "opt-1.3b facebook/opt-1.3b",
        "opt-2.7b": "opt-2.7b facebook/opt-2.7b",
        "opt-6.7b": "opt-6.7b facebook/opt-6.7b",
        "opt-30b": "opt-30b facebook/opt-30b",
    },
    "BLOOM": {
        "bloom-560m": "bloom-560m bigscience/bloom-560m",
        "bloom-1b1": "bloom-1b1 bigscience/bloom-1b1",
        "bloom-3b": "bloom-3b bigscience/bloom-3b",
        "bloom-7b1": "bloom-7b1 bigscience/bloom-7b1",
    },
    "MPT and DBRX": {
        "mpt-7b": "mpt-7b mosaicml/mpt-7b",
        "dbrx-base": "dbrx databricks/dbrx-base databricks/dbrx-instruct",
    },
    "StableLM": {
        "stablelm-base-alpha-3b": "stablelm-base-alpha-3b stabilityai/stablelm-base-alpha-3b",
        "stablelm-3b-4e1t": "stablelm-3b-4e1t stabilityai/stablelm-3b-4e1t",
        "stablelm-2-12b": "stablelm-2-12b stabilityai/stablelm-2-12b",
    },
    "StarCoder": {
        "gpt_bigcode-santacoder": "santacoder bigcode/gpt_bigcode-santacoder bigcode/santacoder",
        "starcoderbase-1b": "starcoderbase-1b bigcode/starcoderbase-1b",
        "starcoderbase-3b": "starcoderbase-3b bigcode/starcoderbase-3b",
        "starcoder2-3b": "starcoder2-3b bigcode/starcoder2-3b",
        "starcoder2-7b": "starcoder2-7b bigcode/starcoder2-7b",
    },
    "Cohere": {
        "aya-23-8B": "aya-23-8b CohereForAI/aya-23-8B",
        "c4ai-command-r-v01": "command-r-35b CohereForAI/c4ai-command-r-v01 | command-r",
        "c4ai-command-r-plus": "command-r-plus CohereForAI/c4ai-command-r-plus",
        "c4ai-command-a-03-2025": "command-a CohereLabs/c4ai-command-a-03-2025",
    },
    "Nemotron": {"Nemotron-4-340B-Base": "nemotron-4-340b nvidia/Nemotron-4-340B-Base"},
    "Other mixtures of experts": {
        "Ling-mini-2.0": "ling-mini-2.0 inclusionAI/Ling-mini-2.0",
        "dots.llm1.base": "dots-llm1-142b rednote-hilab/dots.llm1.base rednote-hilab/dots.llm1.inst",
        "MiniMax-M2.5": "minimax-m2.5 MiniMaxAI/MiniMax-M2.5",
        "Hunyuan-A13B-Instruct": "hunyuan-a13b tencent/Hunyuan-A13B-Instruct",
        "jetmoe-8b": "jetmoe-8b jetmoe/jetmoe-8b",
    },
    "Other dense models": {
        "Baichuan-7B": "baichuan-7b baichuan-inc/Baichuan-7B",
        "Baichuan-13B-Base": "baichuan-13b baichuan-inc/Baichuan-13B-Base baichuan-inc/Baichuan-13B-Chat",
        "Yi-6B (its first file)": "yi-6b 01-ai/Yi-6B",
        "Seed-OSS-36B-Base": "seed-oss-36b ByteDance-Seed/Seed-OSS-36B-Base ByteDance-Seed/Seed-OSS-36B-Instruct",
        "EXAONE-4.0-32B": "exaone-4.0-32b LGAI-EXAONE/EXAONE-4.0-32B",
        "internlm2-7b": "internlm2-7b internlm/internlm2-7b internlm/internlm2_5-7b-chat",
        "MiniCPM-2B-sft-bf16": "minicpm-2b openbmb/MiniCPM-2B-sft-bf16 openbmb/MiniCPM-2B-dpo-bf16",
        "Apertus-70B-2509": "apertus-70b swiss-ai/Apertus-70B-2509",
        "bitnet-b1.58-2B-4T": "bitnet-2b microsoft/bitnet-b1.58-2B-4T",
        "biogpt": "biogpt microsoft/biogpt",
        "ctrl": "ctrl Salesforce/ctrl",
        "cwm": "cwm-32b facebook/cwm",
        "ERNIE-4.5-0.3B-PT": "ernie-4.5-0.3b baidu/ERNIE-4.5-0.3B-PT",
        "openai-gpt": "gpt-1 openai-community/openai-gpt | openai-gpt",
    },
}


def rows():
    """Rows by name; those of more.jsonl count where both have one."""
    found = {}
    for file in ("configs.jsonl", "more.jsonl"):
        for line in (ROWS / file).read_text().splitlines():
            row = json.loads(line)
            if row.get("expect", "exact") == "exact":
                found[row["name"]] = row
    return found


def entry(group, row, names):
    name, *hub = names.split(" | ")[0].split()
    aliases = names.split(" | ")[1].split() if " | " in names else []
    config = dict(row["config"])
    for field in filter(NOISE.search, row["config"]):
        without = {other: value for other, value in config.items() if other != field}
        config = without if read_config(without) == read_config(config) else config
    own = row["source"].startswith("own knowledge")
    found = {"name": name, "group": group, "hub": hub, "aliases": aliases}
    total = row["parameters"] or row["published"]
    if total is not None:
        found |= {"parameters": total, "counted_by": "publisher" if row["published"] else "transformers"}
        if row["published"] and row["published"] != total:  # the publisher counts buffers too
            found["published"] = row["published"]
    if name in STARTS:
        found["start"] = True
    source = f"config.json of {hub[0] if hub else row['name']}" if own else row["source"]
    return found | {"source": source, "date": DATE, "config": config}


def main():
    known = rows()
    lines = [
        json.dumps(entry(group, known[row], names))
        for group, members in NAMES.items()
        for row, names in members.items()
    ]
    OUT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
