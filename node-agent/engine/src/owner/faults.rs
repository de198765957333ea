//! What is wrong at the moment: at most one fault of each kind.

use crate::api::Fault;
use std::mem::discriminant;

/// The faults to show.
#[derive(Debug, Default)]
pub(super) struct Faults(Vec<Fault>);

impl Faults {
    /// Sets (or replaces) the fault of this kind; says whether anything changed.
    pub(super) fn set(&mut self, fault: Fault) -> bool {
        match self
            .0
            .iter_mut()
            .find(|known| discriminant(*known) == discriminant(&fault))
        {
            Some(known) if *known == fault => false,
            Some(known) => {
                *known = fault;
                true
            }
            None => {
                self.0.push(fault);
                true
            }
        }
    }

    /// Ends the faults for which `over` holds; says whether there was one.
    pub(super) fn clear(&mut self, over: impl Fn(&Fault) -> bool) -> bool {
        let before = self.0.len();
        self.0.retain(|fault| !over(fault));
        self.0.len() != before
    }

    pub(super) fn any(&self, which: impl Fn(&Fault) -> bool) -> bool {
        self.0.iter().any(which)
    }

    pub(super) fn list(&self) -> &[Fault] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_of_one_kind_is_shown_once_with_its_latest_words() {
        let mut faults = Faults::default();
        let failed = |message: &str| Fault::StateFailed {
            message: message.into(),
        };
        assert!(faults.set(failed("a")) && faults.set(failed("b")) && !faults.set(failed("b")));
        assert_eq!(faults.list(), [failed("b")]);
        assert!(faults.clear(|fault| matches!(fault, Fault::StateFailed { .. })) && faults.list().is_empty());
    }
}
