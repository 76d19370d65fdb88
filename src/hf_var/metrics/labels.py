# SPDX-License-Identifier: Apache-2.0
"""The names of metrics in model cards and reports."""

# In the order of reports. Metrics without a label are details, such as those of single scales: a report shows them by
# their names, and an evaluation does not publish them.
METRIC_LABELS = {
    "fid": "FID, lower is better",
    "sfid": "sFID, lower is better",
    "inception_score": "Inception Score, higher is better",
    "precision": "precision, higher is better",
    "recall": "recall, higher is better",
    "kid": "KID, lower is better",
    "rfid": "rFID, lower is better",
    "psnr": "PSNR in dB, higher is better",
    "ssim": "SSIM, higher is better",
    "lpips": "LPIPS, lower is better",
    "kl": "KL divergence of the latents from the prior in nats per image",
    "active_dimensions": "active dimensions of the latents",
    "usage": "share of the codebook in use, higher is better",
    "loss": "cross-entropy in nats per token, lower is better",
    "bits_per_token": "cross-entropy in bits per token, lower is better",
    "accuracy": "share of tokens that are the likeliest ones, higher is better",
}


def metric_label(name: str) -> str:
    """Label of a metric, and which direction is better."""
    return METRIC_LABELS.get(name, name)


def metric_name(name: str) -> str:
    """Label of a metric."""
    return metric_label(name).split(",")[0]
