#!/usr/bin/env bash
# Trains on two "hosts", the loopback addresses 127.0.0.1 and 127.0.0.2 of this machine, over real ssh:
# first as the reference launches DeepSpeed (a hostfile of two hosts), then with torchrun on two nodes.
#
#     bash tests/two_hosts.sh [PYTHON]
#
# Needs openssh-server and pdsh (Debian's packages), and prepared data (python data.py). Works in a copy of the
# project, with its own ssh key and an sshd of its own on port 2222; nothing on the machine is changed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-.venv/bin/python}")
work=$(mktemp -d)
trap 'kill $(cat "$work/sshd.pid") 2>/dev/null || true; rm -rf "$work"' EXIT

git ls-files -z | xargs -0 cp --parents -t "$work"
cp dataset/*.npy dataset/*.json "$work/dataset/"
cd "$work"

# An ssh daemon that listens on both addresses and accepts one key.
ssh-keygen -q -t ed25519 -N "" -f key
ssh-keygen -q -t ed25519 -N "" -f host_key
mkdir -p /run/sshd
cat > sshd_config <<END
Port 2222
ListenAddress 127.0.0.1
ListenAddress 127.0.0.2
HostKey $work/host_key
AuthorizedKeysFile $work/key.pub
PidFile $work/sshd.pid
PasswordAuthentication no
PermitRootLogin prohibit-password
StrictModes no
END
"$(command -v sshd || echo /usr/sbin/sshd)" -f sshd_config
# Whoever calls ssh from here on (DeepSpeed, pdsh, this script) gets our key and port.
mkdir bin
cat > bin/ssh <<END
#!/bin/sh
exec $(command -v ssh) -p 2222 -i $work/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=$work/known \\
    -o LogLevel=ERROR "\$@"
END
chmod +x bin/ssh
export PATH="$work/bin:$(dirname "$python"):$PATH"
for host in 127.0.0.1 127.0.0.2; do
    ssh $host true
done

settings="--n_layer 1 --n_head 2 --n_embd 32 --batch_size 2 --gradient_accumulation_steps 2 --max_steps 6
    --eval_interval 3 --eval_iters 2 --device cpu"
export OMP_NUM_THREADS=1

echo "== deepspeed with a hostfile"
printf '127.0.0.1 slots=1\n127.0.0.2 slots=1\n' > hosts.txt
"$python" -m deepspeed.launcher.runner --hostfile=hosts.txt --master_addr 127.0.0.1 --master_port 29611 \
    --launcher pdsh train_deepspeed.py --deepspeed --deepspeed_config deepspeed_config.json $settings
test -d checkpoint/ds/pretrain_last

echo "== torchrun on two nodes"
torchrun() {
    ssh "$1" "cd $work && OMP_NUM_THREADS=1 $python -m torch.distributed.run --nnodes 2 \
        --nproc_per_node 1 --node_rank $2 --master_addr 127.0.0.1 --master_port 29612 train_ddp.py" $settings
}
torchrun 127.0.0.2 1 &
torchrun 127.0.0.1 0
wait
test -f checkpoint/pretrain_last.pt
echo "both launches trained over two hosts"
