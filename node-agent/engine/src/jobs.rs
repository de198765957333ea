//! Slow work as data: what an owner cannot do inline leaves as a [`Job`] and comes back as a [`JobOutcome`].

use std::marker::PhantomData;

/// Work for the pool.
#[derive(Debug)]
pub struct Job<F>(PhantomData<F>);

/// What came of it.
#[derive(Debug)]
pub struct JobOutcome<F>(PhantomData<F>);
