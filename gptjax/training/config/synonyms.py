"""Which key a word means: by the names of other frameworks, and by its letters. Used in hints alone."""

import difflib
from collections.abc import Iterable

# nanoGPT's, Hugging Face's, MaxText's, PyTorch's and Levanter's names, by key.
SYNONYMS = {
    "num_steps": "max_iters max_steps steps num_train_steps total_steps iterations train_steps num_iterations",
    "batch_size": "per_device_train_batch_size per_device_batch_size train_batch_size global_batch_size bs "
    "global_train_batch_size",
    "seq_len": "block_size max_position_embeddings max_target_length context_length max_seq_len sequence_length n_ctx "
    "n_positions context_size max_seq_length model_max_length",
    "grad_accum_steps": "gradient_accumulation_steps accumulate_grad_batches gradient_accumulation accum_steps",
    "log_every": "log_interval logging_steps log_period log_freq",
    "eval_every": "eval_interval eval_steps steps_per_eval eval_freq",
    "eval_batches": "eval_iters max_eval_batches",
    "checkpoint_every": "save_steps checkpoint_period save_interval checkpoint_interval ckpt_interval save_every",
    "checkpoint.keep": "save_total_limit max_to_keep keep_last",
    "init_from": "load_parameters_path model_name_or_path pretrained resume_from",
    "tracker": "wandb_log report_to use_wandb logger",
    "seed": "data_shuffle_seed random_seed rng_seed",
    "compiler_options": "xla_flags compile torch_compile",
    "model.num_layers": "n_layer n_layers num_hidden_layers base_num_decoder_layers depth num_decoder_layers",
    "model.num_heads": "n_head n_heads num_attention_heads base_num_query_heads num_query_heads",
    "model.num_kv_heads": "num_key_value_heads base_num_kv_heads n_kv_heads n_kv_head num_query_groups",
    "model.head_dim": "d_head head_size d_kv",
    "model.embed_dim": "n_embd hidden_size base_emb_dim d_model hidden_dim emb_dim dim width model_dim",
    "model.mlp_dim": "intermediate_size base_mlp_dim n_inner d_ff ffn_dim ffn_hidden_size mlp_hidden_dim",
    "model.dropout": "dropout_rate resid_pdrop attn_pdrop embd_pdrop attention_dropout hidden_dropout",
    "model.norm": "normalization norm_type normalization_type",
    "model.norm_eps": "rms_norm_eps layer_norm_epsilon layer_norm_eps normalization_layer_epsilon epsilon",
    "model.positions": "position_embedding_type pos_emb positional_encoding",
    "model.rope_theta": "rope_base rotary_base rope_max_timescale rotary_emb_base",
    "model.activation": "hidden_act activation_function mlp_activations act_fn",
    "model.biases": "bias use_bias attention_bias mlp_bias",
    "model.tied_embeddings": "tie_word_embeddings tie_embeddings logits_via_embedding weight_tying",
    "model.sliding_window": "window_size attention_window sliding_window_size",
    "model.logits_softcap": "final_logit_softcapping final_logits_soft_cap logit_softcap",
    "model.remat": "remat_policy gradient_checkpointing activation_checkpointing checkpoint_activations",
    "model.dtype": "bf16 fp16 mixed_precision torch_dtype compute_dtype precision",
    "model.param_dtype": "weight_dtype params_dtype",
    "optimizer.name": "opt_type optim optimizer_type",
    "optimizer.peak_learning_rate": "learning_rate lr max_lr peak_lr base_lr",
    "optimizer.schedule": "lr_scheduler_type lr_schedule lr_scheduler decay_lr",
    "optimizer.warmup_steps": "warmup_iters num_warmup_steps warmup_steps_fraction warmup_ratio lr_warmup_steps warmup",
    "optimizer.decay_fraction": "lr_decay_iters decay_steps cooldown cooldown_fraction",
    "optimizer.final_fraction": "min_lr min_lr_ratio cosine_learning_rate_final_fraction min_learning_rate",
    "optimizer.weight_decay": "adam_weight_decay wd",
    "optimizer.beta1": "adam_beta1 adam_b1 b1 momentum",
    "optimizer.beta2": "adam_beta2 adam_b2 b2",
    "optimizer.eps": "adam_epsilon adam_eps",
    "optimizer.clip_norm": "grad_clip max_grad_norm gradient_clipping_threshold gradient_clip_val clip_grad",
    "optimizer.ema_decay": "ema use_ema",
    "loss.z_loss": "z_loss_weight z_loss_multiplier lm_head_z_loss",
    "loss.num_chunks": "num_vocab_tiling vocab_tiling",
    "data.path": "dataset dataset_path data_dir train_file dataset_name hf_path data_path train_data grain_train_files",
    "data.source": "dataset_type data_source",
    "data.store": "cache_dir dataset_cache",
    "data.heldout_fraction": "validation_split_percentage val_fraction test_size validation_split",
    "tokenizer.path": "tokenizer_path tokenizer_name tokenizer_model",
    "tokenizer.kind": "tokenizer_type",
    "tokenizer.vocab_size": "n_vocab num_vocab",
    "mesh.data": "ici_data_parallelism dcn_data_parallelism data_parallel_size dp dp_degree",
    "mesh.fsdp": "ici_fsdp_parallelism dcn_fsdp_parallelism zero fsdp_size data_parallel_shard_degree",
    "mesh.tensor": "ici_tensor_parallelism tensor_parallel_size tp model_parallel tensor_parallel_degree tp_degree",
    "mesh.slices": "num_slices dcn",
    "stopping.patience": "early_stopping_patience early_stopping",
    "lora.rank": "lora_r lora_rank r",
    "lora.alpha": "lora_alpha",
    "tasks.names": "eval_tasks lm_eval_tasks",
}  # fmt: skip
KEYS = {word: key for key, words in SYNONYMS.items() for word in words.split()}
FLAGS = {word: "--workdir" for word in ("out_dir", "output_dir", "run_dir", "base_output_directory", "save_dir")}


def meant(word: str, keys: Iterable[str]) -> str:
    """The key that a word means: one of that very name in any section, a synonym, or the closest; or an empty string.

    Args:
      word: as it was written, with or without a section.
      keys: all dotted keys.
    """
    keys = list(keys)
    sections = {key.partition(".")[0] for key in keys}
    by_name = {key.rpartition(".")[2]: key for key in reversed(keys)} | dict(zip(sections, sections, strict=True))
    name = word.rpartition(".")[2].lower().replace("-", "_")
    if word in keys:
        return word
    if name in KEYS:
        return KEYS[name]
    if name in by_name:
        return by_name[name]
    close = difflib.get_close_matches(word, [*keys, *by_name], n=1) or difflib.get_close_matches(name, by_name, n=1)
    return by_name.get(close[0], close[0]) if close else ""


def hint(word: str, keys: Iterable[str], before: str = "") -> str:
    """` Did you mean "KEY"?`, or an empty string. before: what stands before a key where it is written."""
    key = meant(word, keys)
    return f' Did you mean "{before}{key}"?' if key else ""
