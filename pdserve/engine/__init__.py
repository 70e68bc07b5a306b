"""The engine: a model of transformers over a paged KV pool, one ragged batch at a time.

How it comes to life (`engine.ModelEngine.load`):

1. `checkpoint` finds the files, `model_loader` loads them with transformers' own code or refuses by name.
2. `attention_probe` runs the model once on a few tokens and listens to what its attention asks for.
3. `self_check` keeps the model's own eager logits as the reference.
4. `packed_linear` and `packed_experts` lay the weights out for the CPU's matrix kernels, in place.
5. `kv_pool` takes the memory that is left: one tensor, block-major, mapped by peers on the same host.
6. `self_check` compares; `calibration` measures how long steps take.

What a step is (`engine.ModelEngine.step`):

1. `ragged_batch` flattens the sequences: decode rows first, then prefill chunks, no padding.
2. `attention_plan` says, in index tensors that all layers share, which keys each row sees.
3. The model runs: Llama-like ones on a CPU through `lean_decoder`, others through transformers' modules. At
   each layer `attention` writes the new keys and values to the pool and reads the sequences' own back
   (`tile_attention`), in shapes that make a row's bits depend on its position alone.
4. `sampler` turns the logits of those sequences that asked into tokens.

Who owns which block is decided outside, with `block_allocator`; `chunking` says where chunks end;
`executor` runs an engine beside an event loop; `fake_engine` is an engine without a model.
"""
