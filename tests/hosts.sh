# Virtual hosts for the benchmarks beside this file, which read it with $nodes, $mib and $rate set; without a rate nothing
# shapes their links.
# They are network namespaces called moyai-spread-*, and are gone when the benchmark ends.
cargo build --release -p moyai
moyai=$(ls -t target/*/release/moyai | head -1)
moyai=$PWD/${moyai#"$PWD"/}
lab=$(mktemp -d /tmp/moyai-spread-XXXXXX)
name=$(basename "$lab")
pids=()
strike() {
    for i in $(seq "$nodes"); do "$moyai" --data "$lab/$i" --socket "$lab/$i/sock" down >/dev/null 2>&1 || true; done
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null || true; done
    for i in sw $(seq "$nodes"); do ip netns del "$name-$i" 2>/dev/null || true; done
    rm -rf "$lab"
}
trap strike EXIT

ip netns add "$name-sw"
ip -n "$name-sw" link add br0 type bridge
ip -n "$name-sw" link set br0 up
for i in $(seq "$nodes"); do
    ip netns add "$name-$i"
    ip -n "$name-$i" link set lo up
    ip link add "p$i" netns "$name-sw" type veth peer name eth0 netns "$name-$i"
    ip -n "$name-sw" link set "p$i" master br0 up
    ip -n "$name-$i" addr add "10.77.0.$i/24" dev eth0
    ip -n "$name-$i" link set eth0 up
    # Both ways: what a host sends, and what the switch sends to it.
    if [ -n "$rate" ]; then
        ip netns exec "$name-$i" tc qdisc add dev eth0 root tbf rate "$rate" burst 256k latency 50ms
        ip netns exec "$name-sw" tc qdisc add dev "p$i" root tbf rate "$rate" burst 256k latency 50ms
    fi
    mkdir "$lab/$i"
done
# To be put behind, with its own process's number in $!.
behind() {
    local i=$1
    shift
    exec nsenter --net="/run/netns/$name-$i" "$@"
}
on() { (behind "$@"); }
node() {
    local i=$1
    shift
    on "$i" "$moyai" --data "$lab/$i" --socket "$lab/$i/sock" "$@"
}
image() { # FILE NAME PATCH: an image of random bytes, in files of 1 MiB; PATCH of them are new
    mkdir -p "$lab/content"
    for at in $(seq "$mib"); do
        if [ "$at" -le "$3" ] || [ ! -f "$lab/content/$at" ]; then head -c 1048576 /dev/urandom >"$lab/content/$at"; fi
    done
    tar -C "$lab/content" -cf "$lab/layer.tar" .
    local sum
    sum=$(sha256sum <"$lab/layer.tar" | cut -d' ' -f1)
    echo "{\"architecture\":\"amd64\",\"os\":\"linux\",\"rootfs\":{\"type\":\"layers\",\"diff_ids\":[\"sha256:$sum\"]}}" >"$lab/config.json"
    echo "[{\"Config\":\"config.json\",\"RepoTags\":[\"$2\"],\"Layers\":[\"layer.tar\"]}]" >"$lab/manifest.json"
    tar -C "$lab" -cf "$1" layer.tar config.json manifest.json
}
sent() { ip -n "$name-$1" -s -j link show eth0 | grep -o '"tx":{"bytes":[0-9]*' | grep -o '[0-9]*$'; }
total() { for i in $(seq "$nodes"); do sent "$i"; done | awk '{sum += $1} END {printf "%.0f", sum}'; }
now() { echo "$((${EPOCHREALTIME/./} / 1000))"; }

node 1 init --no-mdns --registry off --label host=1 >/dev/null
ticket=$(node 1 invite --uses "$nodes" 2>/dev/null | awk '{print $3}')
for i in $(seq 2 "$nodes"); do node "$i" join "$ticket" --no-mdns --registry off --label "host=$i" >/dev/null; done
until [ "$(node 1 --json nodes | grep -c '"alive"')" = "$nodes" ]; do sleep 0.5; done
