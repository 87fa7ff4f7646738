"""What plans of language models are tested with: a bundle that has an exit, and a machine of round numbers."""

from __future__ import annotations

from pathlib import Path

from isthmus.apps.cli.decoder_profile import DecoderProfile
from isthmus.split.bundle import Bundle
from isthmus.split.exit_writer import put_certificates, put_exits
from tests.edge_bundle import CONFIG, an_exit, write_tiny
from tests.unit.test_split_exits import certificate

EXIT = 2  # before which layer


def write_early(folder: Path) -> Bundle:
    """With a certified exit."""
    model_id = Bundle.open(write_tiny(folder)).manifest.model_id
    entry, data = an_exit(model_id, EXIT)
    put_exits(folder, model_id, [(entry, data)])
    put_certificates(folder, {EXIT: certificate(data)})
    return Bundle.open(folder)


def a_profile(model_id: str) -> DecoderProfile:
    """Ten ms a layer, five the head."""
    layers = tuple((k, 10.0 * k) for k in range(1, CONFIG.n_layers + 1))
    rows = ((1, 10.0 * CONFIG.n_layers + 5.0), (4, 10.0 * CONFIG.n_layers + 25.0))
    return DecoderProfile(model_id, "tiny", "toy", "toy", "toy", 1, layers, rows, 8.0)
