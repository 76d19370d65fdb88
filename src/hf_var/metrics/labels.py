# SPDX-License-Identifier: Apache-2.0
"""Names of metrics, as people read them."""

METRIC_LABELS = {
    "fid": "FID, lower is better",
    "sfid": "sFID, lower is better",
    "inception_score": "Inception Score, higher is better",
    "precision": "precision, higher is better",
    "recall": "recall, higher is better",
    "kid": "KID, lower is better",
    "kid_std": "standard deviation of KID over its subsets",
    "psnr": "PSNR in dB, higher is better",
    "ssim": "SSIM, higher is better",
    "lpips": "LPIPS, lower is better",
    "rfid": "rFID, lower is better",
    "usage": "share of the codebook in use, higher is better",
    "loss": "cross-entropy in nats per token, lower is better",
    "bits_per_token": "cross-entropy in bits per token, lower is better",
    "accuracy": "share of tokens that are the likeliest ones, higher is better",
}
