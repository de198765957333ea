# syntax=docker/dockerfile:1
# One image with the programs of a node and of the control plane; the pod's command picks one.
#
#   docker build -t mars .
#   mars-node-agent, mars-device-keeper: privileged pods, hostPID, host network · mars-operator: an ordinary pod

FROM rust:1.95-bookworm AS build
# clang: bindings to the ublk interface.
RUN apt-get update && apt-get install -y --no-install-recommends libclang-dev clang && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --locked --release -p mars-node-agent -p mars-operator --bins && \
    mkdir /out && \
    for program in mars-node-agent mars-device-keeper mars-operator; do cp "target/release/$program" /out/; done

FROM debian:bookworm-slim
# losetup and blkid's library serve the loop frontend and the check for foreign signatures.
RUN apt-get update && apt-get install -y --no-install-recommends mount util-linux && rm -rf /var/lib/apt/lists/*
COPY --from=build /out/ /usr/local/bin/
# The agent and the keeper make block devices: they run as root in a privileged pod. The operator runs as nobody by its pod's securityContext.
LABEL org.opencontainers.image.title="MARS for Kubernetes" org.opencontainers.image.licenses="Apache-2.0"
CMD ["mars-operator", "--help"]
