"""Writes the two fp32 forms of a GGUF model that the peers load.

    python -m experiments.peers.prepare_smollm2 --gguf=FILE --out=DIR

DIR receives `model.f32.gguf` (for llama.cpp: same rows, same metadata, every tensor
dequantised) and `hf/` (a Hugging Face directory for the others). All peers then read
the same numbers. Needs torch, transformers, accelerate and gguf; see README.md.
"""

import argparse
import json
import pathlib

DIGITS_THEN_BYTES = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
    ],
}


def write_f32_gguf(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a GGUF file with every tensor dequantised to float32.

    The row order of query and key weights stays llama.cpp's.
    """
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    own = {"general.architecture", "general.file_type"}
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in own:
            continue
        kind = field.types[0]
        sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=sub_type)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_hf_directory(source: pathlib.Path, target: pathlib.Path) -> None:
    """Saves a Llama GGUF file as float32 safetensors with config and tokenizer.

    Two corrections to what transformers imports: the model is rebuilt without its
    quantisation record (else it refuses to be saved), and the tokenizer isolates
    digits before its byte-level split, as the `smollm` pre-tokenizer does.
    """
    import torch
    import transformers

    where = {"gguf_file": source.name}
    folder = str(source.parent)
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **where
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **where)
    fields = quantized.config.to_dict()
    paths = ("_name_or_path", "_model_name_or_path")
    for key in ("quantization_config", "unk_token_id", *paths):
        fields.pop(key, None)
    fields.update(rms_norm_eps=1e-5, architectures=["LlamaForCausalLM"])
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=2
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    path = target / "tokenizer.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["pre_tokenizer"] = DIGITS_THEN_BYTES
    path.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_f32_gguf(args.gguf, args.out / "model.f32.gguf")
    write_hf_directory(args.gguf, args.out / "hf")


if __name__ == "__main__":
    main()
