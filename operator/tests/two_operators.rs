//! Two operators at once, paused and resumed anywhere, over stale observations, with agents that lag, crash and refuse.
//!
//! Without forced changes there are never two actual primaries, no acknowledged write is missing on a later primary, and
//! everything settles on the wish. With forced changes there is never more than one primary per designation, and a
//! designation number is never used twice. A failing run prints its seed: `MARS_SEED=<n> cargo test -p mars-operator
//! --test two_operators`; `MARS_RUNS=<n>` makes more runs.

mod common;

use common::model::{Agent, Api, Record, observe};
use jiff::{Timestamp, ToSpan};
use mars_crds::{MarsAction, MarsReplica};
use mars_operator::{Intent, World, plan};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, BTreeSet};
use uuid::Uuid;

const NODES: [&str; 3] = ["a", "b", "c"];

/// What an operator has in hand.
#[derive(Default)]
struct Operator {
    /// Replicas and actions were read, the resource not yet.
    read: Option<(BTreeMap<String, MarsReplica>, BTreeMap<String, MarsAction>)>,
    /// Planned, partly carried out.
    pending: Option<(World, Vec<Intent>)>,
}

struct Run {
    rng: StdRng,
    seed: u64,
    forced: bool,
    now: Timestamp,
    api: Api,
    agents: Vec<Agent>,
    operators: [Operator; 2],
    silent: BTreeMap<String, i64>,
    written: u64,
    acknowledged: BTreeSet<u64>,
    trace: Vec<String>,
    promotions: usize,
}

impl Run {
    fn new(seed: u64, forced: bool) -> Self {
        Run {
            rng: StdRng::seed_from_u64(seed),
            seed,
            forced,
            now: common::NOW.parse().expect("a time"),
            api: Api::new(&NODES),
            agents: NODES.iter().map(|node| Agent::new(node)).collect(),
            operators: [Operator::default(), Operator::default()],
            silent: NODES.iter().map(|node| ((*node).to_owned(), 0)).collect(),
            written: 0,
            acknowledged: BTreeSet::new(),
            trace: Vec::new(),
            promotions: 0,
        }
    }

    fn id(&mut self) -> Uuid {
        Uuid::from_u128(self.rng.random())
    }

    fn log(&mut self, line: String) {
        self.trace.push(line);
    }

    fn step(&mut self) {
        self.now = self
            .now
            .checked_add(self.rng.random_range(0..4).seconds())
            .expect("in range");
        let who = self.rng.random_range(0..self.agents.len());
        match self.rng.random_range(0..100) {
            0..20 => self.operate(0),
            20..40 => self.operate(1),
            40..54 => self.read_order(who),
            54..68 => self.agent_acts(who),
            68..78 => self.api.report(&self.agents[who]),
            78..90 => self.fetch(who),
            90..96 => self.write(who),
            _ => self.rarely(who),
        }
        self.check();
    }

    fn rarely(&mut self, who: usize) {
        match self.rng.random_range(0..20) {
            0..8 => self.open_or_close(who),
            8..10 => self.crash(who),
            10..13 => self.fall_silent_or_speak(who),
            _ => self.user(who),
        }
    }

    fn operate(&mut self, index: usize) {
        if let Some((world, mut intents)) = self.operators[index].pending.take() {
            let intent = intents.remove(0);
            let done = self.api.apply(&world, &intent);
            if intent.is_decision() {
                self.log(format!(
                    "operator {index}: {intent}{}",
                    if done { "" } else { " – conflict" }
                ));
            }
            if done && !intents.is_empty() {
                self.operators[index].pending = Some((world, intents));
            }
        } else if let Some(read) = self.operators[index].read.take() {
            let world = observe(&read, &self.api.resource, &self.silent, self.now, true);
            let mut words = world.clone();
            words.fresh = false;
            let mut ids: Vec<Uuid> = (0..8).map(|_| self.id()).collect();
            let planned = plan(&world, &mut || ids.pop().expect("enough ids"));
            let cached = plan(&words, &mut Uuid::nil);
            assert!(
                !cached.intents.iter().any(Intent::is_decision),
                "seed {}: a decision from the cache",
                self.seed
            );
            if !planned.intents.is_empty() {
                self.operators[index].pending = Some((world, planned.intents));
            }
        } else {
            self.operators[index].read = Some((self.api.replicas.clone(), self.api.actions.clone()));
        }
    }

    fn read_order(&mut self, who: usize) {
        let agent = &mut self.agents[who];
        if let Some(replica) = self.api.replicas.get(&agent.node) {
            agent.order = Some(replica.spec.clone());
        }
    }

    fn agent_acts(&mut self, who: usize) {
        let (refuse, epoch) = (self.rng.random_bool(0.1), self.id());
        let before = self.agents[who].is_primary();
        self.agents[who].act(refuse, epoch);
        let agent = &self.agents[who];
        if agent.is_primary() != before {
            self.promotions += usize::from(!before);
            let line = format!(
                "{} is {:?} under {:?}",
                agent.node,
                agent.role,
                agent.designation.map(|token| token.number)
            );
            self.log(line);
        }
    }

    fn uuid_of(&self, who: usize) -> Option<Uuid> {
        self.api
            .replicas
            .get(&self.agents[who].node)
            .map(|replica| replica.spec.replica_uuid)
    }

    fn fetch(&mut self, who: usize) {
        let from = self.rng.random_range(0..self.agents.len());
        let count = self.rng.random_range(1..4);
        // Only members that have read their orders take part.
        if let (true, Some(uuid), true) = (from != who, self.uuid_of(from), self.agents[who].order.is_some()) {
            let source = self.agents[from].clone();
            self.agents[who].fetch(&source, uuid, count);
        }
    }

    fn write(&mut self, who: usize) {
        if self.agents[who].is_primary() {
            self.written += 1;
            self.agents[who].log.push(Record::Write(self.written));
            self.acknowledged.insert(self.written);
        }
    }

    fn open_or_close(&mut self, who: usize) {
        let agent = &mut self.agents[who];
        agent.open = agent.is_primary() && !agent.open;
    }

    fn crash(&mut self, who: usize) {
        self.agents[who].crash();
        let line = format!("{} crashes", self.agents[who].node);
        self.log(line);
    }

    fn fall_silent_or_speak(&mut self, who: usize) {
        let silent = self.silent.get_mut(NODES[who]).expect("a node");
        *silent = if *silent == 0 { 100 } else { 0 };
    }

    fn user(&mut self, who: usize) {
        let node = NODES[who];
        match self.rng.random_range(0..4) {
            0 | 1 => {
                self.log(format!("the wish is {node}"));
                self.api.edit(|resource| node.clone_into(&mut resource.spec.primary));
            }
            2 => {
                let verb = if self.forced { "Failover" } else { "Handover" };
                let name = format!("act-{}", self.api.actions.len());
                self.log(format!("{verb} to {node} ({name})"));
                self.api.act(&name, verb, node, self.now);
            }
            _ => {
                let attach = self.rng.random_bool(0.5).then(|| node.to_owned());
                self.log(format!("attached to {attach:?}"));
                self.api.edit(|resource| resource.spec.attached_to = attach);
            }
        }
    }

    fn fail(&self, what: &str) -> ! {
        let forced = if self.forced { " (forced)" } else { "" };
        let tail = self.trace.len().saturating_sub(60);
        panic!(
            "seed {}{forced}: {what}\nlast steps:\n  {}",
            self.seed,
            self.trace[tail..].join("\n  ")
        );
    }

    fn check(&self) {
        if let Some(violation) = &self.api.violation {
            self.fail(violation);
        }
        let primaries: Vec<&Agent> = self.agents.iter().filter(|agent| agent.is_primary()).collect();
        let mut under = BTreeSet::new();
        for agent in &primaries {
            let number = agent.primary_under.map(|token| token.number);
            if !under.insert(number) {
                self.fail(&format!("two primaries under designation {number:?}"));
            }
        }
        if self.forced {
            return;
        }
        if primaries.len() > 1 {
            self.fail("two actual primaries");
        }
        for agent in primaries {
            let held: BTreeSet<u64> = agent
                .log
                .iter()
                .filter_map(|record| {
                    if let Record::Write(number) = record {
                        Some(*number)
                    } else {
                        None
                    }
                })
                .collect();
            if let Some(lost) = self.acknowledged.difference(&held).next() {
                self.fail(&format!(
                    "{} is primary without the acknowledged write {lost}",
                    agent.node
                ));
            }
        }
    }

    /// Everybody is heard, nobody uses a device, everything is carried out: does it settle?
    fn settle(&mut self) {
        self.silent.values_mut().for_each(|silent| *silent = 0);
        for round in 0..400 {
            self.now = self.now.checked_add(2.seconds()).expect("in range");
            for who in 0..self.agents.len() {
                self.agents[who].open = false;
                self.read_order(who);
                let epoch = self.id();
                self.agents[who].act(false, epoch);
                for from in 0..self.agents.len() {
                    if let Some(uuid) = self.uuid_of(from).filter(|_| from != who) {
                        let source = self.agents[from].clone();
                        self.agents[who].fetch(&source, uuid, 1000);
                    }
                }
                self.api.report(&self.agents[who]);
                self.check();
            }
            for index in 0..2 {
                for _ in 0..4 {
                    self.operate(index);
                    self.check();
                }
            }
            if round > 50 && self.is_settled() {
                return;
            }
        }
        let status = self.api.resource.status.clone().unwrap_or_default();
        let agents: Vec<String> = self.agents.iter().map(|agent| format!("{agent:?}")).collect();
        self.fail(&format!(
            "does not settle: {:?}\n{}\n{:?}",
            status.designation,
            agents.join("\n"),
            status.conditions
        ));
    }

    fn is_settled(&self) -> bool {
        let Some(designation) = self
            .api
            .resource
            .status
            .as_ref()
            .and_then(|status| status.designation.clone())
        else {
            return false;
        };
        let primaries: Vec<&str> = self
            .agents
            .iter()
            .filter(|agent| agent.is_primary())
            .map(|agent| agent.node.as_str())
            .collect();
        let spec = &self.api.resource.spec;
        let attached = spec.attached_to.clone().unwrap_or_default();
        let wish_counts = attached.is_empty() && designation.wish_seen != spec.primary;
        let attach_counts = !attached.is_empty() && designation.attached_seen != attached;
        // After forced changes forks may stand in the way of a wish; then the designated one must be primary alone.
        let wished = self.forced || !(wish_counts || attach_counts);
        wished && primaries == [designation.node.as_str()]
    }
}

fn runs(forced: bool, count: u64, steps: usize) {
    let only: Option<u64> = std::env::var("MARS_SEED").ok().and_then(|seed| seed.parse().ok());
    let count = std::env::var("MARS_RUNS")
        .ok()
        .and_then(|runs| runs.parse().ok())
        .unwrap_or(count);
    let seeds = only.map_or_else(|| 0..count, |seed| seed..seed + 1);
    let (mut promotions, mut designations) = (0, 0);
    for seed in seeds.clone() {
        let mut run = Run::new(seed, forced);
        for _ in 0..steps {
            run.step();
        }
        run.settle();
        promotions += run.promotions;
        designations += run.api.designations.len();
    }
    println!("{count} runs, {designations} designations, {promotions} promotions");
    assert!(
        only.is_some() || promotions > seeds.count() * 2,
        "the runs hardly do anything: {promotions} promotions"
    );
}

#[test]
fn a57_two_operators_at_once_never_make_two_primaries_and_never_lose_a_write() {
    runs(false, 60, 1500);
}

#[test]
fn a57_forced_changes_never_make_two_primaries_under_one_designation() {
    runs(true, 60, 1500);
}
