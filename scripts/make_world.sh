#!/usr/bin/env bash
# Makes the embedded world again, from nothing but the code: about three hours on one CPU core. Each script goes on from
# its last checkpoint when it is started again.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python=.venv/bin/python

# The text tower first: teachers train on it. Then the autoencoder, which the judge must see through.
$python scripts/train_clip.py --updates 3000 --lr 1.5e-3 --work runs/world/clip-1 --out runs/world/text
$python scripts/train_vae.py --updates 2500 --kl 5e-4 --work runs/world/vae-work-1 --out runs/world/vae-1
$python scripts/train_vae.py --init runs/world/vae-1 --updates 1500 --lr 1e-3 --work runs/world/vae-work-2 \
        --out assets/shapes-sd/vae
$python scripts/train_clip.py --init runs/world/text --codec assets/shapes-sd/vae --work runs/world/clip-2 \
        --out assets/shapes-clip
$python scripts/train_teacher.py --text runs/world/text --vae assets/shapes-sd/vae --updates 9500 --out assets/shapes-sd

# The flow teacher reads two text towers, as Stable Diffusion 3 does.
$python scripts/train_clip.py --updates 500 --lr 1.5e-3 --seed 1 --work runs/world/clip-text-2 --out runs/world/text-2
$python scripts/train_flow_teacher.py --latents runs/world/teacher/cache.pt --out assets/shapes-sd3
