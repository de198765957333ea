//! Who this node is: a uuid of our own, the cluster it belongs to, and the boot it runs in.
//!
//! Invariant: none of these is ever derived from a host name, an address or a Kubernetes uid.
