"""The settings of sd-scripts' `fine_tune.py` and `sdxl_train.py`, and what becomes of each here.

The one home of this fact: for hints about unknown keys, the converter, and the table in
docs/from-sd-scripts.md. Source: sd-scripts at 48d368fa.
"""

SETTINGS = {
    # The model.
    "pretrained_model_name_or_path": "model.path",
    "v2": "model.family",
    "vae": "model.vae",
    "gradient_checkpointing": "model.gradient_checkpointing",
    # The data.
    "in_json": "data.metadata",
    "metadata_file": "data.metadata",
    "train_data_dir": "data.latents",
    "image_dir": "data.latents",
    "dataset_repeats": "data.repeats",
    "num_repeats": "data.repeats",
    "flip_aug": "data.flip",
    "alpha_mask": "data.alpha_mask",
    "masked_loss": "data.alpha_mask",
    # Captions.
    "shuffle_caption": "caption.shuffle",
    "keep_tokens": "caption.keep_tokens",
    "keep_tokens_separator": "caption.keep_tokens_separator",
    "caption_separator": "caption.separator",
    "secondary_separator": "caption.secondary_separator",
    "caption_tag_dropout_rate": "caption.tag_dropout_rate",
    "caption_dropout_rate": "caption.dropout_rate",
    "caption_dropout_every_n_epochs": "caption.dropout_every_epochs",
    "token_warmup_step": "caption.token_warmup_steps",
    "token_warmup_min": "caption.token_warmup_min",
    "max_token_length": "text.max_tokens",
    "clip_skip": "text.clip_skip",
    # Noise and loss.
    "v_parameterization": "noise.prediction",
    "zero_terminal_snr": "noise.zero_terminal_snr",
    "noise_offset": "noise.offset",
    "multires_noise_iterations": "noise.multires_iterations",
    "multires_noise_discount": "noise.multires_discount",
    "ip_noise_gamma": "noise.input_perturbation",
    "min_timestep": "noise.min_timestep",
    "max_timestep": "noise.max_timestep",
    "loss_type": "loss.kind",
    "huber_schedule": "loss.huber_schedule",
    "huber_c": "loss.huber_c",
    "huber_scale": "loss.huber_scale",
    "min_snr_gamma": "loss.min_snr_gamma",
    "debiased_estimation_loss": "loss.debiased",
    "scale_v_pred_loss_like_noise_pred": "loss.v_like_noise",
    "v_pred_like_loss": "loss.v_pred_like",
    # The optimizer.
    "optimizer_type": "optimizer.name",
    "use_8bit_adam": "optimizer.name",
    "use_lion_optimizer": "optimizer.name",
    "optimizer_args": "optimizer.arguments",
    "learning_rate": "optimizer.learning_rate",
    "train_text_encoder": "optimizer.text_learning_rate",
    "learning_rate_te": "optimizer.text_learning_rate",
    "learning_rate_te1": "optimizer.text_learning_rate",
    "learning_rate_te2": "optimizer.text2_learning_rate",
    "lr_scheduler": "optimizer.schedule",
    "lr_warmup_steps": "optimizer.warmup_steps",
    "lr_scheduler_args": "optimizer.schedule_arguments",
    "lr_scheduler_num_cycles": "optimizer.schedule_arguments",
    "lr_scheduler_power": "optimizer.schedule_arguments",
    "max_grad_norm": "optimizer.clip_grad_norm",
    "fused_backward_pass": "optimizer.fused_backward",
    # The run.
    "output_dir": "train.output_dir",
    "output_name": "train.output_dir",
    "max_train_steps": "train.max_steps",
    "max_train_epochs": "train.max_epochs",
    "seed": "train.seed",
    "train_batch_size": "train.batch_size",
    "batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulation",
    "max_data_loader_n_workers": "train.workers",
    "mixed_precision": "train.precision",
    "full_bf16": "train.precision",
    "torch_compile": "speed.compile",
    "deepspeed": "engine.kind",
    "zero_stage": "engine.zero_stage",
    "offload_optimizer_device": "engine.offload_optimizer_device",
    "offload_optimizer_nvme_path": "engine.offload_optimizer_nvme_path",
    "offload_param_device": "engine.offload_param_device",
    "offload_param_nvme_path": "engine.offload_param_nvme_path",
    "zero3_init_flag": "engine.zero3_init_flag",
    "zero3_save_16bit_model": "engine.zero3_save_16bit_model",
    "fp16_master_weights_and_gradients": "engine.fp16_master_weights_and_gradients",
    "save_every_n_steps": "checkpoint.every_steps",
    "save_every_n_epochs": "checkpoint.every_epochs",
    "save_last_n_epochs": "checkpoint.keep",
    "save_model_as": "export.formats",
    "save_precision": "export.dtype",
    "metadata_title": "export.title",
    "sample_every_n_steps": "samples.every_steps",
    "log_with": "log.trackers",
    "log_tracker_name": "log.project",
}
"""Setting of sd-scripts -> the setting that decides the same here, as `section.key`.

Those of a dataset config are among them: metadata_file, image_dir, num_repeats, batch_size.
"""

LORA_SETTINGS = {
    "unet_lr": "optimizer.learning_rate",
    "text_encoder_lr": "optimizer.text_learning_rate",
}
"""The same for settings of sd-scripts' LoRA scripts, for hints alone."""

_LEFT_OUT = {
    "training reads cached latents alone, which python -m trainer.cache can make": (
        "cache_latents cache_latents_to_disk vae_batch_size skip_cache_check no_half_vae"
    ),
    "a bucket is the size of the cached latents": (
        "resolution enable_bucket bucket_no_upscale bucket_reso_steps min_bucket_reso "
        "max_bucket_reso resize_interpolation"
    ),
    "a rewritten file always has one alternative per line": "enable_wildcard",
    "only metadata files are read": "caption_extension caption_extention cache_info",
    "captions are encoded anew in each step": (
        "cache_text_encoder_outputs cache_text_encoder_outputs_to_disk"
    ),
    "the fastest kernel of torch is measured and used; speed.attention asks for another one": (
        "xformers sdpa mem_eff_attn diffusers_xformers"
    ),
    "they change the speed or the memory alone": (
        "dynamo_backend lowram highvram persistent_data_loader_workers "
        "disable_mmap_load_safetensors fused_optimizer_groups"
    ),
    "DDP is always set up so that it takes the least memory and notices a lost process": (
        "ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph"
    ),
    "every save is a whole state, from which a run goes on": (
        "save_state save_state_on_train_end save_last_n_epochs_state save_last_n_steps "
        "save_last_n_steps_state save_n_epoch_ratio"
    ),
    "files are always safetensors": "use_safetensors",
    "pictures are made of [[samples.prompts]], which have to be written by hand": (
        "sample_every_n_epochs sample_at_first sample_prompts sample_sampler"
    ),
    "sd-scripts ignores it beside metadata files; [validation] holds records out here": (
        "validation_split validation_seed"
    ),
    "logs lie in the folder of the run": (
        "logging_dir log_prefix log_config log_tracker_config wandb_api_key wandb_run_name "
        "console_log_level console_log_file console_log_simple output_config"
    ),
    "the trained model gets no such metadata": (
        "metadata_author metadata_description metadata_license metadata_tags "
        "metadata_usage_hint metadata_thumbnail metadata_merged_from metadata_trigger_phrase "
        "metadata_preprocessor metadata_is_negative_embedding"
    ),
    "nothing is uploaded": (
        "huggingface_repo_id huggingface_repo_type huggingface_path_in_repo huggingface_token "
        "huggingface_repo_visibility save_state_to_huggingface async_upload"
    ),
    "tokenizers need no download": "tokenizer_cache_dir",
    "a dry run shows what is trained": "debug_dataset",
    "schedules that read it do not exist here": (
        "lr_decay_steps lr_scheduler_min_lr_ratio lr_scheduler_timescale"
    ),
    "the LoRA and DreamBooth scripts alone read it": (
        "network_multiplier prior_loss_weight class_tokens custom_attributes"
    ),
    "it says where other settings lie, which are read": "config_file dataset_config",
}
_REFUSED = {
    "pictures are not read, so nothing can change them: cache latents without it": (
        "color_aug random_crop face_crop_aug_range"
    ),
    "masks are read from cached latents alone: cache them with alpha_mask": "conditioning_data_dir",
    "regularization pictures are not known here: add them as a data set": "reg_data_dir is_reg",
    "it adds to some alternatives only: use capmerge rewrite --prefix and --suffix": (
        "caption_prefix caption_suffix"
    ),
    "brackets in captions are read as text: remove it": "weighted_captions",
    "noise of a strength that is drawn itself is not known here: give a fixed one": (
        "adaptive_noise_scale noise_offset_random_strength ip_noise_gamma_random_strength"
    ),
    "parts of the U-Net have one rate: choose them with model.train_only and model.freeze": (
        "block_lr"
    ),
    "other schedules are not known here: choose one of optimizer.schedule": "lr_scheduler_type",
    "weights in fp16 or fp8 do not train well: use mixed_precision": ("full_fp16 fp8_base"),
    "states of sd-scripts cannot be read: begin with the model that it saved": (
        "resume resume_from_huggingface"
    ),
    "data sets of other programs cannot be read: use a metadata file": "dataset_class",
}


def _by_option(options_of: dict[str, str]) -> dict[str, str]:
    return {option: reason for reason, options in options_of.items() for option in options.split()}


LEFT_OUT = _by_option(_LEFT_OUT)
"""Setting of sd-scripts -> the reason why leaving it out does not change what is trained."""
REFUSED = _by_option(_REFUSED)
"""Setting of sd-scripts -> why what it asks for cannot be done here, and the next step."""
