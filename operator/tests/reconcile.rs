//! The whole operator against the embedded API: real watches, conflicts and faults, with agents of the model.

#[path = "common/cluster.rs"]
mod cluster;
mod common;

use cluster::{Cluster, RESOURCE};
use common::model::Record;
use kube::Api;
use mars_crds::{MarsAction, MarsNode, MarsReplica, MarsResource, conditions};
use mars_local::faults::Plan;
use mars_operator::{Config, Settings};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const NODES: [&str; 3] = ["a", "b", "c"];

fn spec(primary: &str) -> Value {
    let replicas: Vec<Value> = NODES.iter().map(|node| json!({"node": node, "pool": "p"})).collect();
    json!({"size": "1Gi", "primary": primary, "replicas": replicas})
}

struct Operator {
    cancel: CancellationToken,
    task: JoinHandle<Result<(), mars_operator::cluster::ClusterError>>,
}

impl Operator {
    fn start(cluster: &Cluster, name: &str, leader_election: bool) -> Operator {
        Operator::start_with(cluster, name, leader_election, Settings::default())
    }

    fn start_with(cluster: &Cluster, name: &str, leader_election: bool, settings: Settings) -> Operator {
        let config = Config {
            namespace: "default".to_owned(),
            identity: name.to_owned(),
            leader_election,
            lease_duration: Duration::from_secs(3),
            resync: Duration::from_millis(500),
            settings,
            ..Config::default()
        };
        let client = cluster.api.client_named(Some(name)).expect("a client");
        let cancel = CancellationToken::new();
        let task = tokio::spawn(mars_operator::run(client, config, cancel.clone()));
        Operator { cancel, task }
    }

    async fn stop(self) {
        self.cancel.cancel();
        let ended = tokio::time::timeout(Duration::from_secs(20), self.task)
            .await
            .expect("stops in time");
        ended.expect("no panic").expect("no error");
    }
}

fn is_settled_on(resource: &MarsResource, node: &str) -> bool {
    let status = resource.status.clone().unwrap_or_default();
    status.primary == node && status.wish == node && status.state == "Healthy"
}

fn condition(resource: &MarsResource, type_: &str) -> String {
    let status = resource.status.clone().unwrap_or_default();
    conditions::get(&status.conditions, type_)
        .map(|condition| format!("{} {}: {}", condition.status, condition.reason, condition.message))
        .unwrap_or_default()
}

fn set_open(cluster: &Cluster, node: &str, open: bool) {
    let mut machines = cluster.machines.lock().expect("sound");
    machines.agents.get_mut(node).expect("an agent").open = open;
}

/// What an automatic failover would need as evidence.
async fn has_recorded_kube_nodes(cluster: &Cluster, status: &mars_crds::MarsResourceStatus) {
    let kube_nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(cluster.client.clone());
    assert_eq!(status.replicas.len(), NODES.len());
    for member in &status.replicas {
        let kube_node = kube_nodes.get(&member.node).await.expect("a Node");
        assert_eq!(member.kube_node_uid, kube_node.metadata.uid, "{}", member.node);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a50_a_resource_is_born_handed_over_refused_while_in_use_failed_over_and_deleted() {
    let cluster = Cluster::start(&NODES, None).await;
    let operator = Operator::start(&cluster, "one", true);
    cluster.create(RESOURCE, &spec("a")).await;
    let born = cluster
        .until("a is primary", |resource| is_settled_on(resource, "a"))
        .await;
    let born = born.status.expect("a status");
    let uuid = born.uuid.expect("a uuid");
    has_recorded_kube_nodes(&cluster, &born).await;

    cluster
        .machines
        .lock()
        .expect("sound")
        .agents
        .get_mut("a")
        .expect("a")
        .log
        .push(Record::Write(1));
    cluster.patch(json!({"spec": {"primary": "b"}})).await;
    cluster
        .until("b is primary", |resource| is_settled_on(resource, "b"))
        .await;
    let log = cluster.machines.lock().expect("sound").agents["b"].log.clone();
    assert!(log.contains(&Record::Write(1)), "{log:?}");

    set_open(&cluster, "b", true);
    let replicas: Api<MarsReplica> = Api::all(cluster.client.clone());
    let in_use = |replica: &MarsReplica| {
        replica
            .status
            .as_ref()
            .is_some_and(|status| !status.opened_by.is_empty())
    };
    while !in_use(&replicas.get("mydata.b").await.expect("readable")) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    cluster.patch(json!({"spec": {"primary": "c"}})).await;
    let refused = cluster
        .until("the handover is refused", |resource| {
            condition(resource, "Switching").starts_with("False DeviceInUse")
        })
        .await;
    assert!(
        condition(&refused, "Switching").contains("process writer (pid 1)"),
        "{}",
        condition(&refused, "Switching")
    );
    set_open(&cluster, "b", false);
    cluster
        .until("c is primary", |resource| is_settled_on(resource, "c"))
        .await;

    cluster.machines.lock().expect("sound").forced = true;
    cluster
        .act(
            "back",
            json!({"verb": "Failover", "resource": RESOURCE, "node": "a", "acknowledge": uuid}),
        )
        .await;
    cluster
        .until("a is primary again", |resource| {
            resource.status.as_ref().is_some_and(|status| status.primary == "a")
        })
        .await;
    let actions: Api<MarsAction> = Api::all(cluster.client.clone());
    let succeeded = |action: &MarsAction| {
        action
            .status
            .as_ref()
            .is_some_and(|status| status.phase == mars_crds::ActionPhase::Succeeded)
    };
    while !succeeded(&actions.get("back").await.expect("readable")) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let events = cluster.events().await;
    for reason in ["Create", "Handover", "Released", "Failover", "ActionSucceeded"] {
        assert!(
            events.iter().any(|event| event == reason),
            "no event {reason}: {events:?}"
        );
    }

    cluster
        .resources()
        .delete(RESOURCE, &kube::api::DeleteParams::default())
        .await
        .expect("deleted");
    cluster.until_gone().await;
    operator.stop().await;
    cluster.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a57_two_operators_over_a_faulty_api_never_make_two_primaries_and_settle() {
    let seed: u64 = std::env::var("MARS_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(rand::random);
    println!("seed {seed}: replay with MARS_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let cluster = Cluster::start(&NODES, None).await;
    let operators = [
        Operator::start(&cluster, "one", false),
        Operator::start(&cluster, "two", false),
    ];
    cluster.create(RESOURCE, &spec("a")).await;
    cluster
        .until("a is primary", |resource| is_settled_on(resource, "a"))
        .await;
    cluster.api.api().faults.set(Some(Plan {
        seed,
        clients: vec!["one".to_owned(), "two".to_owned()],
        error: 0.02,
        conflict: 0.05,
        lost_answer: 0.05,
        delay: 0.2,
        delay_ms: 50,
        stale: 0.1,
        stale_revisions: 8,
        watch_delay_ms: 200,
        watch_cut: 0.02,
        watch_reorder: 0.2,
        watch_lose: 0.02,
        ..Plan::default()
    }));
    let (mut written, mut at) = (0, 0);
    for round in 0..8 {
        at = (at + rng.random_range(1..3)) % NODES.len();
        let wish = NODES[at];
        cluster.patch(json!({"spec": {"primary": wish}})).await;
        if round % 2 == 0 {
            cluster
                .until("it gets there in spite of the faults", |resource| {
                    is_settled_on(resource, wish)
                })
                .await;
        }
        for _ in 0..rng.random_range(1..30) {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let mut machines = cluster.machines.lock().expect("sound");
            if let Some(primary) = machines.agents.values_mut().find(|agent| agent.is_primary()) {
                written += 1;
                primary.log.push(Record::Write(written));
            }
        }
    }
    cluster.api.api().faults.set(None);
    cluster.patch(json!({"spec": {"primary": "c"}})).await;
    cluster
        .until("it settles on c", |resource| is_settled_on(resource, "c"))
        .await;
    {
        let machines = cluster.machines.lock().expect("sound");
        let log = &machines.agents["c"].log;
        let lost = (1..=written).find(|number| !log.contains(&Record::Write(*number)));
        assert_eq!(lost, None, "seed {seed}: an acknowledged write is gone");
        println!("{written} writes, {} promotions", machines.promotions);
    }
    for operator in operators {
        operator.stop().await;
    }
    cluster.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a58_all_objects_deleted_and_restored_without_status_are_re_adopted_where_they_were() {
    let cluster = Cluster::start(&NODES, None).await;
    let operator = Operator::start(&cluster, "one", true);
    cluster.create(RESOURCE, &spec("a")).await;
    cluster
        .until("a is primary", |resource| is_settled_on(resource, "a"))
        .await;
    cluster.patch(json!({"spec": {"primary": "b"}})).await;
    let before = cluster
        .until("b is primary", |resource| is_settled_on(resource, "b"))
        .await
        .status
        .expect("a status");
    operator.stop().await;
    let logs = || {
        let machines = cluster.machines.lock().expect("sound");
        machines
            .agents
            .iter()
            .map(|(node, agent)| (node.clone(), agent.log.clone()))
            .collect::<Vec<_>>()
    };
    // Heartbeats must have told what the nodes hold.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let held = logs();
    cluster.destroy_all().await;
    cluster.create(RESOURCE, &spec("a")).await;
    let operator = Operator::start(&cluster, "another", true);
    let after = cluster
        .until("b is primary again", |resource| is_settled_on(resource, "b"))
        .await
        .status
        .expect("a status");
    assert_eq!(after.uuid, before.uuid);
    let uuids = |status: &mars_crds::MarsResourceStatus| {
        status
            .replicas
            .iter()
            .map(|replica| (replica.node.clone(), replica.replica_uuid))
            .collect::<Vec<_>>()
    };
    assert_eq!(uuids(&after), uuids(&before));
    let number = |status: &mars_crds::MarsResourceStatus| {
        status.designation.as_ref().map_or(0, |designation| designation.number)
    };
    assert!(
        number(&after) >= number(&before) + 1000,
        "{} after {}",
        number(&after),
        number(&before)
    );
    assert_eq!(logs(), held, "no byte was touched");
    operator.stop().await;
    cluster.finish().await;
}

async fn ended(cluster: &Cluster, name: &str) -> mars_crds::MarsActionStatus {
    let actions: Api<MarsAction> = Api::all(cluster.client.clone());
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    loop {
        let status = actions.get(name).await.expect("readable").status.unwrap_or_default();
        if status.completion_time.is_some() {
            return status;
        }
        assert!(std::time::Instant::now() < deadline, "{name} does not end: {status:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_action_whose_resource_does_not_exist_fails_after_a_grace_and_is_not_armed_for_a_later_one() {
    let cluster = Cluster::start(&NODES, None).await;
    let settings = Settings {
        action_grace_seconds: 2,
        ..Settings::default()
    };
    let operator = Operator::start_with(&cluster, "one", true, settings);
    let rotate = |ttl: i64| json!({"verb": "RotateLog", "resource": RESOURCE, "ttlSeconds": ttl});
    let asked = std::time::Instant::now();
    cluster.act("lost", rotate(3600)).await;
    let status = ended(&cluster, "lost").await;
    assert!(asked.elapsed() >= Duration::from_secs(2), "it had its grace");
    assert_eq!((status.phase, status.id), (mars_crds::ActionPhase::Failed, None));
    assert!(
        status.message.contains("no MarsResource mydata") && status.message.contains("generateName"),
        "{}",
        status.message
    );
    let complete = conditions::get(&status.conditions, conditions::COMPLETE).expect("a condition");
    assert_eq!(complete.reason, "NoSuchResource");
    // A resource that comes a moment after its action is what the action is about.
    cluster.act("early", rotate(3600)).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    cluster.create(RESOURCE, &spec("a")).await;
    cluster
        .until("a is primary", |resource| is_settled_on(resource, "a"))
        .await;
    let status = ended(&cluster, "early").await;
    assert!(status.id.is_some(), "it has begun: {status:?}");
    // One of a resource that is gone is cleared away, too.
    cluster
        .act(
            "brief",
            json!({"verb": "Handover", "resource": RESOURCE, "node": "a", "ttlSeconds": 3}),
        )
        .await;
    ended(&cluster, "brief").await;
    cluster
        .resources()
        .delete(RESOURCE, &kube::api::DeleteParams::default())
        .await
        .expect("deleted");
    cluster.until_gone().await;
    let actions: Api<MarsAction> = Api::all(cluster.client.clone());
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while actions.get_opt("brief").await.expect("readable").is_some() {
        assert!(std::time::Instant::now() < deadline, "a finished action stays for ever");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    operator.stop().await;
    cluster.finish().await;
}

async fn until_node(cluster: &Cluster, name: &str, what: &str, wanted: impl Fn(&MarsNode) -> bool) -> MarsNode {
    let nodes: Api<MarsNode> = Api::all(cluster.client.clone());
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    loop {
        let node = nodes.get(name).await.expect("readable");
        if wanted(&node) {
            return node;
        }
        assert!(std::time::Instant::now() < deadline, "{what}: {node:#?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn says_silent(node: &MarsNode) -> bool {
    let list = node.status.iter().flat_map(|status| &status.conditions);
    let mut list = list.filter(|condition| condition.type_ == conditions::SILENT);
    list.next().is_some_and(|condition| condition.status == "True")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_not_heard_says_so_once_and_no_more_when_it_is_back() {
    let cluster = Cluster::start(&NODES, None).await;
    let settings = Settings {
        liveness_seconds: 1,
        node_silent_seconds: 2,
        ..Settings::default()
    };
    let operator = Operator::start_with(&cluster, "one", true, settings);
    until_node(&cluster, "b", "b reports", |node| node.status.is_some()).await;
    cluster.machines.lock().expect("sound").off.push("b".to_owned());
    let silent = until_node(&cluster, "b", "b is called silent", says_silent).await;
    let status = silent.status.clone().unwrap_or_default();
    assert!(
        status.inventory_complete && status.address == "b:7777",
        "what the agent said stays"
    );
    // Told once, not in every pass.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let later = until_node(&cluster, "b", "b is called silent", says_silent).await;
    assert_eq!(later.metadata.resource_version, silent.metadata.resource_version);
    let others = until_node(&cluster, "a", "a reports", |node| node.status.is_some()).await;
    assert!(!says_silent(&others));
    assert!(cluster.events().await.iter().any(|reason| reason == "AgentSilent"));
    cluster.machines.lock().expect("sound").off.clear();
    until_node(&cluster, "b", "b is not called silent any more", |node| {
        !says_silent(node)
    })
    .await;
    operator.stop().await;
    cluster.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_operator_leads_and_the_other_takes_over_when_it_stops() {
    let cluster = Cluster::start(&NODES, None).await;
    let first = Operator::start(&cluster, "one", true);
    cluster.create(RESOURCE, &spec("a")).await;
    cluster
        .until("a is primary", |resource| is_settled_on(resource, "a"))
        .await;
    let second = Operator::start(&cluster, "two", true);
    let leases: Api<k8s_openapi::api::coordination::v1::Lease> = Api::namespaced(cluster.client.clone(), "default");
    let holder = || async {
        let lease = leases.get(mars_operator::leader::LEASE).await.expect("a lease");
        lease.spec.and_then(|spec| spec.holder_identity).unwrap_or_default()
    };
    assert_eq!(holder().await, "one");
    first.stop().await;
    cluster.patch(json!({"spec": {"primary": "b"}})).await;
    cluster
        .until("b is primary", |resource| is_settled_on(resource, "b"))
        .await;
    assert_eq!(holder().await, "two");
    second.stop().await;
    cluster.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_object_that_cannot_be_read_stalls_nobody_else() {
    // Definitions without schema: an API server that checks nothing.
    let mut definitions = mars_local::mars::definitions();
    for definition in &mut definitions {
        definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"] =
            json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
    }
    let cluster = Cluster::start(&NODES, Some(definitions)).await;
    let operator = Operator::start(&cluster, "one", true);
    let kind = kube::api::ApiResource::erase::<MarsResource>(&());
    let untyped: Api<kube::api::DynamicObject> = Api::all_with(cluster.client.clone(), &kind);
    let bad = json!({"apiVersion": "mars.storage/v1alpha1", "kind": "MarsResource", "metadata": {"name": "bad"},
        "spec": {"size": [], "replicas": "nonsense"}});
    let bad = serde_json::from_value(bad).expect("an object");
    untyped
        .create(&kube::api::PostParams::default(), &bad)
        .await
        .expect("created");
    cluster.create(RESOURCE, &spec("a")).await;
    cluster
        .until("a is primary", |resource| is_settled_on(resource, "a"))
        .await;
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while !cluster.events().await.iter().any(|reason| reason == "Undecodable") {
        assert!(std::time::Instant::now() < deadline, "nobody is told about the bad one");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    operator.stop().await;
    cluster.finish().await;
}
