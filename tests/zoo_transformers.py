"""Zoo cases from transformers: one small, randomly initialised configuration per architecture, with a loss per sample."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import POOL, Case, Loss, audio_loss, cross_entropy, image_loss, language_model_loss, text_loss

t: Any = pytest.importorskip("transformers")

NORMS = ("*norm*",)  # for models that have no bias at all
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
WORDS: dict[str, Any] = {**SIZES, "vocab_size": 100, "max_position_embeddings": 40}
FULL: dict[str, Any] = {  # encoder-decoder configurations of the BART kind
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 100,
    "max_position_embeddings": 40,
}
WAVES: dict[str, Any] = {
    **SIZES,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 16,
}
PIXELS: dict[str, Any] = {**SIZES, "image_size": 32, "patch_size": 8}


def seq2seq_loss(model: Any, batch: Any) -> Tensor:
    """Mean cross-entropy of the decoder's next token; the decoder reads the labels shifted by one."""
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        decoder_input_ids=batch["decoder_input_ids"],
    ).logits
    targets = batch["decoder_input_ids"].roll(-1, 1)
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)


def logits_loss(model: Any, batch: Any) -> Tensor:
    return cross_entropy(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"])


def pixels_loss(model: Any, batch: Any) -> Tensor:
    """Semantic segmentation: the mean over pixels of each image's cross-entropy."""
    logits = model(batch["pixel_values"]).logits
    targets = (batch["pixel_values"][:, 0] > 0).long()[:, : logits.shape[-2], : logits.shape[-1]]
    return F.cross_entropy(logits, targets, reduction="none").flatten(1).mean(1)


def detection_loss(model: Any, batch: Any) -> Tensor:
    """Every query against its own made-up class and box: DETR's terms without the matching."""
    out = model(batch["pixel_values"])
    classes = torch.arange(out.logits.shape[1]) % out.logits.shape[2]
    ce = F.cross_entropy(out.logits.transpose(1, 2), classes.expand(out.logits.shape[0], -1), reduction="none").mean(1)
    losses: Tensor = ce + (out.pred_boxes - 0.5).abs().flatten(1).mean(1)
    return losses


def towers_loss(model: Any, batch: Any) -> Tensor:
    """One minus the cosine of the two towers' embeddings: no negatives from the batch."""
    out = model(**batch)
    return 1 - F.cosine_similarity(out.image_embeds, out.text_embeds, dim=-1)


def masked_autoencoder_loss(model: Any, batch: Any) -> Tensor:
    """Reconstruction of the masked patches; which are masked is chosen by noise that comes with the batch."""
    out = model(batch["pixel_values"], noise=batch["noise"])
    target = model.patchify(batch["pixel_values"])
    losses: Tensor = ((out.logits - target).pow(2).mean(-1) * out.mask).sum(1) / out.mask.sum(1)
    return losses


def forecast_loss(model: Any, batch: Any) -> Tensor:
    predicted: Tensor = model(past_values=batch["past_values"]).prediction_outputs
    losses: Tensor = (predicted - batch["future_values"]).pow(2).mean((1, 2))
    return losses


def actions_loss(model: Any, batch: Any) -> Tensor:
    predicted: Tensor = model(**batch).action_preds
    losses: Tensor = (predicted - batch["actions"]).pow(2).flatten(1).mean(1)
    return losses


def data() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (POOL, 10), generator=g)
    kept = torch.ones(POOL, 10, dtype=torch.long)
    kept[0, -4:], kept[2, -2:], kept[5, -1:] = 0, 0, 0
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    long = torch.randint(3, 90, (POOL, 16), generator=g)
    text = {"input_ids": ids, "attention_mask": kept, "labels": labels}
    pixels = torch.randn(POOL, 3, 32, 32, generator=g)
    decoder = torch.randint(3, 90, (POOL, 6), generator=g)
    boxes = torch.randint(0, 40, (POOL, 10, 4), generator=g)
    boxes[..., 2:] += boxes[..., :2]
    words = {"input_ids": ids, "attention_mask": kept}
    return {
        "text": text,
        "ids": words,
        "plain": {"input_ids": ids, "labels": labels},
        "long": {"input_ids": long, "attention_mask": torch.ones_like(long), "labels": labels},
        "long_plain": {"input_ids": long, "labels": labels},
        "pairs": {**words, "decoder_input_ids": decoder},
        "image": {"pixel_values": pixels, "labels": labels},
        "pixels": {"pixel_values": pixels},
        "image64": {"pixel_values": torch.randn(POOL, 3, 64, 64, generator=g), "labels": labels},
        "audio": {"input_values": torch.randn(POOL, 400, generator=g), "labels": labels},
        "mel": {"input_features": torch.randn(POOL, 8, 20, generator=g), "labels": labels},
        "mel_rows": {"input_values": torch.randn(POOL, 24, 16, generator=g), "labels": labels},
        "frames": {"input_features": torch.randn(POOL, 20, 8, generator=g), "labels": labels},
        "video": {"pixel_values": torch.randn(POOL, 4, 3, 16, 16, generator=g), "labels": labels},
        "towers": {**words, "pixel_values": pixels},
        "seen_text": {**words, "pixel_values": pixels, "labels": labels},
        "masked": {"pixel_values": pixels, "noise": torch.rand(POOL, 16, generator=g)},
        "layout": {**text, "bbox": boxes},
        "layout3": {**words, "bbox": boxes, "pixel_values": pixels, "labels": labels},
        "table": {**text, "token_type_ids": torch.randint(0, 2, (POOL, 10, 7), generator=g)},
        "regions": {
            **text,
            "visual_embeds": torch.randn(POOL, 3, 16, generator=g),
            "visual_attention_mask": torch.ones(POOL, 3, dtype=torch.long),
        },
        "bytes": {"inputs": ids, "attention_mask": kept, "labels": labels},
        "series": {
            "past_values": torch.randn(POOL, 16, 2, generator=g),
            "future_values": torch.randn(POOL, 4, 2, generator=g),
        },
        "episodes": {
            "states": torch.randn(POOL, 4, 5, generator=g),
            "actions": torch.randn(POOL, 4, 3, generator=g),
            "returns_to_go": torch.randn(POOL, 4, 1, generator=g),
            "timesteps": torch.arange(4).repeat(POOL, 1),
            "attention_mask": torch.ones(POOL, 4, dtype=torch.long),
        },
    }


Row = tuple[str, str, str, Callable[[], Any], Loss, str] | tuple[str, str, str, Callable[[], Any], Loss, str, Any]


def table() -> list[Row]:
    """Name, family, model class, configuration, loss, data, and trainables where not the biases."""
    words, lm = "language", language_model_loss
    # fmt: off
    return [
        # Encoders of text
        ("albert", words, "AlbertForSequenceClassification", lambda: t.AlbertConfig(**WORDS, embedding_size=16), text_loss, "text"),
        ("electra", words, "ElectraForSequenceClassification", lambda: t.ElectraConfig(**WORDS, embedding_size=16), text_loss, "text"),
        ("deberta_v2", words, "DebertaV2ForSequenceClassification", lambda: t.DebertaV2Config(**WORDS, relative_attention=True, pos_att_type="c2p|p2c", position_buckets=8, norm_rel_ebd="layer_norm", pooler_hidden_size=32, conv_kernel_size=3), text_loss, "text"),
        ("deberta", words, "DebertaForSequenceClassification", lambda: t.DebertaConfig(**WORDS, relative_attention=True, pos_att_type="c2p|p2c", pooler_hidden_size=32), text_loss, "text"),
        ("xlnet", words, "XLNetForSequenceClassification", lambda: t.XLNetConfig(vocab_size=100, d_model=32, n_layer=2, n_head=4, d_inner=64), text_loss, "text"),
        ("funnel", words, "FunnelForSequenceClassification", lambda: t.FunnelConfig(vocab_size=100, block_sizes=[1, 1], d_model=32, n_head=4, d_head=8, d_inner=64), text_loss, "text"),
        ("longformer", words, "LongformerForSequenceClassification", lambda: t.LongformerConfig(**WORDS, attention_window=4, pad_token_id=0), text_loss, "long"),
        ("big_bird", words, "BigBirdForSequenceClassification", lambda: t.BigBirdConfig(**WORDS, attention_type="original_full"), text_loss, "text"),
        ("big_bird_sparse", words, "BigBirdForSequenceClassification", lambda: t.BigBirdConfig(**{**WORDS, "max_position_embeddings": 64}, attention_type="block_sparse", block_size=2, num_random_blocks=1), text_loss, "long"),
        ("mpnet", words, "MPNetForSequenceClassification", lambda: t.MPNetConfig(**WORDS), text_loss, "text"),
        ("roformer", words, "RoFormerForSequenceClassification", lambda: t.RoFormerConfig(**WORDS), text_loss, "text"),
        ("xlm_roberta", words, "XLMRobertaForSequenceClassification", lambda: t.XLMRobertaConfig(**WORDS), text_loss, "text"),
        ("camembert", words, "CamembertForSequenceClassification", lambda: t.CamembertConfig(**WORDS), text_loss, "text"),
        ("xmod", words, "XmodForSequenceClassification", lambda: t.XmodConfig(**WORDS, default_language="en_XX"), text_loss, "text"),
        ("nystromformer", words, "NystromformerForSequenceClassification", lambda: t.NystromformerConfig(**WORDS, segment_means_seq_len=16, num_landmarks=4, conv_kernel_size=3), logits_loss, "long_plain"),
        ("yoso", words, "YosoForSequenceClassification", lambda: t.YosoConfig(**WORDS, use_expectation=True), text_loss, "text"),
        ("fnet", words, "FNetForSequenceClassification", lambda: t.FNetConfig(hidden_size=32, num_hidden_layers=2, intermediate_size=64, vocab_size=100), logits_loss, "plain"),
        ("squeezebert", words, "SqueezeBertForSequenceClassification", lambda: t.SqueezeBertConfig(**WORDS, embedding_size=32), text_loss, "text"),
        ("convbert", words, "ConvBertForSequenceClassification", lambda: t.ConvBertConfig(**WORDS, embedding_size=32, conv_kernel_size=3, head_ratio=2), text_loss, "text"),
        ("mobilebert", words, "MobileBertForSequenceClassification", lambda: t.MobileBertConfig(**WORDS, embedding_size=32, intra_bottleneck_size=32), text_loss, "text"),
        ("rembert", words, "RemBertForSequenceClassification", lambda: t.RemBertConfig(**WORDS, input_embedding_size=16, output_embedding_size=16), text_loss, "text"),
        ("roc_bert", words, "RoCBertForSequenceClassification", lambda: t.RoCBertConfig(**WORDS, enable_pronunciation=False, enable_shape=False), text_loss, "text"),
        ("modernbert", words, "ModernBertForSequenceClassification", lambda: t.ModernBertConfig(**WORDS, norm_bias=True, attention_bias=True, mlp_bias=True, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2), text_loss, "text"),
        ("esm", words, "EsmForSequenceClassification", lambda: t.EsmConfig(**WORDS, pad_token_id=1, mask_token_id=2, position_embedding_type="rotary"), text_loss, "text"),
        ("xlm", words, "XLMForSequenceClassification", lambda: t.XLMConfig(vocab_size=100, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=40), text_loss, "text"),
        ("canine", words, "CanineForSequenceClassification", lambda: t.CanineConfig(**{**WORDS, "max_position_embeddings": 64}, local_transformer_stride=8, num_hash_buckets=16, downsampling_rate=2), text_loss, "long"),
        ("perceiver", words, "PerceiverForSequenceClassification", lambda: t.PerceiverConfig(vocab_size=100, max_position_embeddings=10, num_latents=6, d_latents=16, d_model=16, num_blocks=1, num_self_attends_per_block=2, num_self_attention_heads=2, num_cross_attention_heads=2), logits_loss, "bytes"),
        ("layoutlm", words, "LayoutLMForSequenceClassification", lambda: t.LayoutLMConfig(**WORDS, max_2d_position_embeddings=128), logits_loss, "layout"),
        ("tapas", "tabular", "TapasForSequenceClassification", lambda: t.TapasConfig(**WORDS, type_vocab_sizes=[3, 8, 8, 2, 8, 8, 2], reset_position_index_per_cell=False), logits_loss, "table"),
        # Decoders of text
        ("opt", words, "OPTForCausalLM", lambda: t.OPTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, vocab_size=100, max_position_embeddings=40, word_embed_proj_dim=32), lm, "ids"),
        ("bloom", words, "BloomForCausalLM", lambda: t.BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4), lm, "ids"),
        ("gpt_neox", words, "GPTNeoXForCausalLM", lambda: t.GPTNeoXConfig(**WORDS), lm, "ids"),
        ("gpt_neo", words, "GPTNeoForCausalLM", lambda: t.GPTNeoConfig(vocab_size=100, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], max_position_embeddings=40, window_size=4), lm, "ids"),
        ("gptj", words, "GPTJForCausalLM", lambda: t.GPTJConfig(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=40, rotary_dim=4), lm, "ids"),
        ("codegen", words, "CodeGenForCausalLM", lambda: t.CodeGenConfig(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=40, n_ctx=40, rotary_dim=4), lm, "ids"),
        ("falcon", words, "FalconForCausalLM", lambda: t.FalconConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bias=True, alibi=False, multi_query=True), lm, "ids"),
        ("stablelm", words, "StableLmForCausalLM", lambda: t.StableLmConfig(**WORDS, num_key_value_heads=2, use_qkv_bias=True), lm, "ids"),
        ("qwen2", words, "Qwen2ForCausalLM", lambda: t.Qwen2Config(**WORDS, num_key_value_heads=2), lm, "ids"),
        ("gemma", words, "GemmaForCausalLM", lambda: t.GemmaConfig(**WORDS, num_key_value_heads=2, head_dim=8, attention_bias=True), lm, "ids"),
        ("phi", words, "PhiForCausalLM", lambda: t.PhiConfig(**WORDS), lm, "ids"),
        ("starcoder2", words, "Starcoder2ForCausalLM", lambda: t.Starcoder2Config(**WORDS, num_key_value_heads=2), lm, "ids"),
        ("biogpt", words, "BioGptForCausalLM", lambda: t.BioGptConfig(**WORDS), lm, "ids"),
        ("mpt", words, "MptForCausalLM", lambda: t.MptConfig(d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=40, vocab_size=100), lm, "ids", NORMS),
        ("mixtral", words, "MixtralForCausalLM", lambda: t.MixtralConfig(**WORDS, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2), lm, "ids", NORMS),
        ("gpt_oss", words, "GptOssForCausalLM", lambda: t.GptOssConfig(**WORDS, num_key_value_heads=2, head_dim=8, num_local_experts=3, num_experts_per_tok=2, sliding_window=4, layer_types=["sliding_attention", "full_attention"]), lm, "ids"),
        ("mamba", words, "MambaForCausalLM", lambda: t.MambaConfig(vocab_size=100, hidden_size=16, state_size=4, num_hidden_layers=2, use_bias=True), lm, "ids"),
        ("mamba2", words, "Mamba2ForCausalLM", lambda: t.Mamba2Config(vocab_size=100, hidden_size=16, state_size=4, num_hidden_layers=2, num_heads=4, head_dim=8, n_groups=2, chunk_size=4, use_bias=True), lm, "ids"),
        ("rwkv", words, "RwkvForCausalLM", lambda: t.RwkvConfig(vocab_size=100, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2, intermediate_size=32, context_length=16, rescale_every=0), lm, "ids"),
        # Encoder and decoder
        ("t5", words, "T5ForConditionalGeneration", lambda: t.T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0), seq2seq_loss, "pairs", ("*layer_norm*",)),
        ("bart", words, "BartForConditionalGeneration", lambda: t.BartConfig(**FULL), seq2seq_loss, "pairs"),
        ("pegasus", words, "PegasusForConditionalGeneration", lambda: t.PegasusConfig(**FULL), seq2seq_loss, "pairs"),
        ("mbart", words, "MBartForConditionalGeneration", lambda: t.MBartConfig(**FULL), seq2seq_loss, "pairs"),
        ("marian", words, "MarianMTModel", lambda: t.MarianConfig(**FULL, pad_token_id=0), seq2seq_loss, "pairs"),
        ("led", words, "LEDForConditionalGeneration", lambda: t.LEDConfig(**{k: v for k, v in FULL.items() if not k.startswith("max")}, max_encoder_position_embeddings=40, max_decoder_position_embeddings=40, attention_window=4), seq2seq_loss, "pairs"),
        # Vision
        ("deit", "vision", "DeiTForImageClassification", lambda: t.DeiTConfig(**PIXELS), image_loss, "image"),
        ("beit", "vision", "BeitForImageClassification", lambda: t.BeitConfig(**PIXELS, use_relative_position_bias=True), image_loss, "image"),
        ("dinov2", "vision", "Dinov2ForImageClassification", lambda: t.Dinov2Config(**PIXELS), image_loss, "image"),
        ("convnextv2", "vision", "ConvNextV2ForImageClassification", lambda: t.ConvNextV2Config(hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1]), image_loss, "image"),
        ("resnet_bottleneck", "vision", "ResNetForImageClassification", lambda: t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2]), image_loss, "image"),
        ("efficientnet", "vision", "EfficientNetForImageClassification", lambda: t.EfficientNetConfig(image_size=32, width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320, depth_divisor=8), image_loss, "image64"),
        ("mobilenet_v1", "vision", "MobileNetV1ForImageClassification", lambda: t.MobileNetV1Config(depth_multiplier=0.25, image_size=32), image_loss, "image"),
        ("mobilenet_v2", "vision", "MobileNetV2ForImageClassification", lambda: t.MobileNetV2Config(depth_multiplier=0.25, image_size=32), image_loss, "image64"),
        ("regnet", "vision", "RegNetForImageClassification", lambda: t.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8), image_loss, "image"),
        ("bit", "vision", "BitForImageClassification", lambda: t.BitConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_groups=4, layer_type="preactivation"), image_loss, "image"),
        ("segformer", "vision", "SegformerForSemanticSegmentation", lambda: t.SegformerConfig(hidden_sizes=[8, 16], depths=[1, 1], num_encoder_blocks=2, sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=2), pixels_loss, "pixels"),
        ("detr", "vision", "DetrForObjectDetection", lambda: t.DetrConfig(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"]), d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=5, num_labels=3), detection_loss, "pixels"),
        ("yolos", "vision", "YolosForObjectDetection", lambda: t.YolosConfig(**{**PIXELS, "image_size": [32, 32]}, num_detection_tokens=4, num_labels=3), detection_loss, "pixels"),
        ("swinv2", "vision", "Swinv2ForImageClassification", lambda: t.Swinv2Config(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4), image_loss, "image"),
        ("focalnet", "vision", "FocalNetForImageClassification", lambda: t.FocalNetConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], focal_levels=[2, 2], focal_windows=[3, 3]), image_loss, "image"),
        ("poolformer", "vision", "PoolFormerForImageClassification", lambda: t.PoolFormerConfig(hidden_sizes=[8, 16], depths=[1, 1], num_encoder_blocks=2, patch_sizes=[7, 3], strides=[4, 2], padding=[2, 1]), image_loss, "image"),
        ("levit", "vision", "LevitForImageClassification", lambda: t.LevitConfig(image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8], mlp_ratio=[2, 2, 2], attention_ratio=[2, 2, 2]), image_loss, "image64"),
        ("mobilevit", "vision", "MobileViTForImageClassification", lambda: t.MobileViTConfig(image_size=64, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 48], num_attention_heads=2, mlp_ratio=2.0), image_loss, "image64"),
        ("pvt", "vision", "PvtForImageClassification", lambda: t.PvtConfig(image_size=32, num_encoder_blocks=2, depths=[1, 1], sequence_reduction_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[4, 2], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2]), image_loss, "image"),
        ("cvt", "vision", "CvtForImageClassification", lambda: t.CvtConfig(patch_sizes=[7, 3], patch_stride=[4, 2], patch_padding=[2, 1], embed_dim=[8, 16], num_heads=[1, 2], depth=[1, 2], mlp_ratio=[2.0, 2.0], attention_drop_rate=[0.0, 0.0], drop_rate=[0.0, 0.0], drop_path_rate=[0.0, 0.0], qkv_bias=[True, True], cls_token=[False, True], qkv_projection_method=["dw_bn", "dw_bn"], kernel_qkv=[3, 3], padding_kv=[1, 1], stride_kv=[2, 2], padding_q=[1, 1], stride_q=[1, 1]), image_loss, "image"),
        ("swiftformer", "vision", "SwiftFormerForImageClassification", lambda: t.SwiftFormerConfig(image_size=64, depths=[1, 1, 1, 1], embed_dims=[8, 16, 16, 24], mlp_ratio=2), image_loss, "image64"),
        ("vit_mae", "vision", "ViTMAEForPreTraining", lambda: t.ViTMAEConfig(**PIXELS, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=32), masked_autoencoder_loss, "masked"),
        ("hiera", "vision", "HieraForImageClassification", lambda: t.HieraConfig(embed_dim=8, image_size=[32, 32], patch_kernel=[7, 7], patch_stride=[4, 4], patch_padding=[3, 3], depths=[1, 1], num_heads=[1, 2], num_query_pool=1, query_stride=[2, 2], masked_unit_size=[4, 4], masked_unit_attention=[True, False]), image_loss, "image"),
        ("timesformer", "video", "TimesformerForVideoClassification", lambda: t.TimesformerConfig(**{**PIXELS, "image_size": 16}, num_frames=4), image_loss, "video"),
        ("videomae", "video", "VideoMAEForVideoClassification", lambda: t.VideoMAEConfig(**{**PIXELS, "image_size": 16}, num_frames=4), image_loss, "video"),
        # Audio
        ("hubert", "audio", "HubertForSequenceClassification", lambda: t.HubertConfig(**WAVES), audio_loss, "audio"),
        ("wavlm", "audio", "WavLMForSequenceClassification", lambda: t.WavLMConfig(**WAVES, num_buckets=16, max_bucket_distance=20), audio_loss, "audio"),
        ("data2vec_audio", "audio", "Data2VecAudioForSequenceClassification", lambda: t.Data2VecAudioConfig(**{k: v for k, v in WAVES.items() if not k.startswith("num_conv")}, num_conv_pos_embeddings=2, conv_pos_kernel_size=5), audio_loss, "audio"),
        ("wav2vec2_conformer", "audio", "Wav2Vec2ConformerForSequenceClassification", lambda: t.Wav2Vec2ConformerConfig(**WAVES, conv_depthwise_kernel_size=5), audio_loss, "audio"),
        ("whisper_encoder", "audio", "WhisperForAudioClassification", lambda: t.WhisperConfig(**{k: v for k, v in FULL.items() if not k.startswith("max")}, num_mel_bins=8, max_source_positions=10, max_target_positions=10, classifier_proj_size=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1), logits_loss, "mel"),
        ("ast", "audio", "ASTForAudioClassification", lambda: t.ASTConfig(**SIZES, patch_size=8, frequency_stride=8, time_stride=8, max_length=24, num_mel_bins=16), audio_loss, "mel_rows"),
        # Several kinds of input
        ("clip", "multimodal", "CLIPModel", lambda: t.CLIPConfig(text_config={**WORDS, "eos_token_id": 2}, vision_config=PIXELS, projection_dim=16), towers_loss, "towers"),
        ("siglip", "multimodal", "SiglipModel", lambda: t.SiglipConfig(text_config=WORDS, vision_config=PIXELS), towers_loss, "towers"),
        ("vilt", "multimodal", "ViltForQuestionAnswering", lambda: t.ViltConfig(**WORDS, image_size=32, patch_size=8, max_image_length=-1), logits_loss, "seen_text"),
        ("layoutlmv3", "multimodal", "LayoutLMv3ForSequenceClassification", lambda: t.LayoutLMv3Config(**WORDS, input_size=32, patch_size=8, coordinate_size=6, shape_size=4, max_2d_position_embeddings=128, rel_pos_bins=8, rel_2d_pos_bins=8), logits_loss, "layout3"),
        ("visual_bert", "multimodal", "VisualBertForVisualReasoning", lambda: t.VisualBertConfig(**WORDS, visual_embedding_dim=16, num_labels=2), logits_loss, "regions"),
        ("git", "multimodal", "GitForCausalLM", lambda: t.GitConfig(**WORDS, vision_config=PIXELS), git_loss, "towers"),
        # Series and control
        ("patchtst", "series", "PatchTSTForPrediction", lambda: t.PatchTSTConfig(num_input_channels=2, context_length=16, prediction_length=4, patch_length=4, patch_stride=4, d_model=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, loss="mse", norm_type="layernorm", num_targets=2), forecast_loss, "series"),
        ("patchtsmixer", "series", "PatchTSMixerForPrediction", lambda: t.PatchTSMixerConfig(num_input_channels=2, context_length=16, prediction_length=4, patch_length=4, patch_stride=4, d_model=8, num_layers=2, loss="mse"), forecast_loss, "series"),
        ("decision_transformer", "control", "DecisionTransformerModel", lambda: t.DecisionTransformerConfig(state_dim=5, act_dim=3, hidden_size=32, max_ep_len=16, n_layer=2, n_head=4, n_positions=40), actions_loss, "episodes"),
    ]
    # fmt: on


def git_loss(model: Any, batch: Any) -> Tensor:
    """A caption's mean negative log-likelihood; the image's tokens come first in the logits."""
    logits = model(**batch).logits
    logits = logits[:, -batch["input_ids"].shape[1] :][:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none").mean(1)


@functools.cache
def cases() -> dict[str, Case]:
    """One case per architecture; ``attention`` is left at zero, since only the first fourteen count fused calls."""
    pools = data()

    def make(cls: str, config: Callable[[], Any]) -> Callable[[], nn.Module]:
        return lambda: getattr(t, cls)(config())

    return {
        name: Case(name, make(cls, config), loss, pools[kind], family=family, trainable=(rest or ("bias",))[0])
        for name, family, cls, config, loss, kind, *rest in table()
    }
