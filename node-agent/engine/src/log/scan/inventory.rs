//! Which files in the log directory make up the log.
//!
//! Segments in the order of their numbers; one that starts lower than an earlier one supersedes it. Files with an all-zero
//! header were prepared and never used. Of a file only its header is read here, and it is not kept open: a log may have more segments than
//! a process may have open files.
//!
//! Invariant: a file is called stale only on positive evidence (a later segment supersedes it, its header was never written, or it is
//! proven not to lead to its successor), never because something else is damaged.

use super::{
    Cursor, FileId, FormatError, ScanError, ScanParams, SegmentHeader, SegmentMeta, SegmentName, Step, Stop, Store,
    StoreFile, TailClass, io_error,
};

/// A segment with a valid header.
pub(super) struct Found {
    pub(super) header: SegmentHeader,
    crc: u32,
    file_bytes: u64,
}

impl Found {
    /// At the beginning of its content.
    pub(super) fn cursor<S: Store>(&self, store: &S) -> Result<Cursor<S::File>, ScanError> {
        let name = self.header.name;
        store
            .open(&FileId::Segment(name))
            .and_then(|file| Cursor::new(file, self.header.clone(), self.crc))
            .map_err(io_error(format!("open {name}")))
    }

    pub(super) fn meta(&self) -> SegmentMeta {
        SegmentMeta {
            name: self.header.name,
            start: self.header.start(),
            file_bytes: self.file_bytes,
        }
    }

    /// Whether the content leads to exactly the beginning of `next`.
    fn leads_to<S: Store>(&self, store: &S, next: &SegmentHeader) -> Result<bool, ScanError> {
        let mut cursor = self.cursor(store)?;
        loop {
            let step = cursor
                .next(next.start_lsn)
                .map_err(io_error(format!("read {}", self.header.name)))?;
            match step {
                Step::Record(_) => {}
                Step::Limit => return Ok(cursor.at().lsn == next.start_lsn && cursor.at().chain == next.start_chain),
                Step::Stop(_) => return Ok(false),
            }
        }
    }
}

/// See the module.
pub(super) struct Inventory {
    /// What makes up the log, ascending.
    pub(super) segments: Vec<Found>,
    /// What does not.
    pub(super) stale: Vec<SegmentName>,
    /// Segments that a later one has superseded.
    pub(super) superseded: Vec<Found>,
    /// Files whose header is damaged.
    pub(super) damaged: Vec<SegmentName>,
    pub(super) next_number: u32,
}

/// Whether `earlier` still tells something although `later` begins at or below it: its epoch, when that is empty.
fn is_witness(earlier: &SegmentHeader, later: &SegmentHeader) -> bool {
    let parent = &later.epoch.parent;
    earlier.start_lsn == later.start_lsn && earlier.epoch.id == parent.epoch && parent.lsn == later.start_lsn
}

impl Inventory {
    /// Reads all headers.
    pub(super) fn take<S: Store>(store: &S, params: &ScanParams) -> Result<Self, ScanError> {
        let files = store.list().map_err(io_error("list the log directory"))?;
        let mut names: Vec<SegmentName> = files
            .into_iter()
            .filter_map(|id| {
                if let FileId::Segment(name) = id {
                    Some(name)
                } else {
                    None
                }
            })
            .collect();
        names.sort_unstable();
        let mut inventory = Self {
            segments: Vec::new(),
            stale: Vec::new(),
            superseded: Vec::new(),
            damaged: Vec::new(),
            next_number: 1,
        };
        for name in names {
            inventory.next_number = inventory.next_number.max(name.number.saturating_add(1));
            if name.number < params.first_segment {
                inventory.stale.push(name);
            } else {
                inventory.add(store, params, name)?;
            }
        }
        Ok(inventory)
    }

    fn add<S: Store>(&mut self, store: &S, params: &ScanParams, name: SegmentName) -> Result<(), ScanError> {
        let file = store
            .open(&FileId::Segment(name))
            .map_err(io_error(format!("open {name}")))?;
        let header = match Cursor::read_header(&file).map_err(io_error(format!("read the header of {name}")))? {
            Ok((header, crc)) if header.name == name => (header, crc),
            Err(FormatError::Zero) => {
                self.stale.push(name);
                return Ok(());
            }
            Err(error @ FormatError::Newer { .. }) => return Err(ScanError::Newer { segment: name, error }),
            Ok(_) | Err(_) => {
                self.damaged.push(name);
                return Ok(());
            }
        };
        let (header, crc) = header;
        if header.identity != params.identity {
            let whose = header.identity;
            let owner = format!(
                "cluster {}, resource {}, replica {}",
                whose.cluster, whose.resource, whose.replica
            );
            return Err(ScanError::Foreign { segment: name, owner });
        }
        while let Some(last) = self.segments.last()
            && last.header.start_lsn >= header.start_lsn
            && !is_witness(&last.header, &header)
        {
            self.superseded.extend(self.segments.pop());
        }
        let file_bytes = file.size().map_err(io_error(format!("size of {name}")))?;
        self.segments.push(Found {
            header,
            crc,
            file_bytes,
        });
        Ok(())
    }

    /// Segments before `index` that do not lead to it are left-overs of a removal that was interrupted. Returns the new index.
    pub(super) fn forget_strangers_before<S: Store>(&mut self, store: &S, index: usize) -> Result<usize, ScanError> {
        for later in (1..=index).rev() {
            let header = &self.segments[later].header;
            let earlier = &self.segments[later - 1];
            if header.previous == earlier.header.name.number {
                continue;
            }
            let hidden = self
                .damaged
                .iter()
                .any(|name| (earlier.header.name..header.name).contains(name));
            if hidden || earlier.leads_to(store, header)? {
                continue;
            }
            let strangers: Vec<SegmentName> = self.segments.drain(..later).map(|found| found.header.name).collect();
            self.stale.extend(strangers);
            self.stale.sort_unstable();
            return Ok(index - later);
        }
        Ok(index)
    }

    /// A walk that ended in front of a file with a damaged header ended because of it.
    pub(super) fn blame_damaged_header(&self, stop: Stop) -> Stop {
        let next = self
            .segments
            .iter()
            .map(|found| found.header.name)
            .find(|name| *name > stop.segment);
        let hidden = |name: &&SegmentName| **name > stop.segment && next.is_none_or(|next| **name < next);
        match self.damaged.iter().find(hidden) {
            Some(name) if stop.ended => Stop {
                segment: *name,
                file_offset: 0,
                lsn: stop.lsn,
                class: TailClass::Header,
                ended: false,
            },
            _ => stop,
        }
    }

    /// The log does not reach back far enough.
    pub(super) fn missing(&self, params: &ScanParams) -> ScanError {
        let mut present = match self.segments.first() {
            None => "there is no segment".to_owned(),
            Some(first) => format!(
                "the oldest segment, {}, starts at {}",
                first.header.name, first.header.start_lsn
            ),
        };
        if !self.damaged.is_empty() {
            let names: Vec<String> = self.damaged.iter().map(ToString::to_string).collect();
            present = format!("{present}, and the headers of {} are damaged", names.join(", "));
        }
        ScanError::Missing {
            wanted: params.from,
            present,
        }
    }
}
