//! Consistent cuts.

use super::*;

/// Writers and movers of pages run between cuts: none of them holds `stand` while a cut
/// is made.
struct Traffic<'a> {
    parts: &'a [Part],
    pages: u64,
    /// The values written, word by word: for each page one word of each part and one of
    /// the host.
    written: Vec<AtomicU64>,
    stand: RwLock<()>,
    is_over: AtomicBool,
    /// The last cut that was read completely, and its words.
    last: Mutex<Option<(u64, Vec<u64>)>>,
    /// Pages of cuts that were unchanged since the previous one.
    same: AtomicU64,
}

impl<'a> Traffic<'a> {
    fn new(parts: &'a [Part], pages: u64) -> Self {
        let words = pages * (parts.len() as u64 + 1);
        Traffic {
            parts,
            pages,
            written: (0..words).map(|_| AtomicU64::new(0)).collect(),
            stand: RwLock::new(()),
            is_over: AtomicBool::new(false),
            last: Mutex::default(),
            same: AtomicU64::new(0),
        }
    }

    fn wrote(&self, page: u64, word: usize) -> &AtomicU64 {
        &self.written[page as usize * (self.parts.len() + 1) + word]
    }

    fn until_over(&self, seed: u64, step: impl Fn(&mut SmallRng)) {
        let mut rng = SmallRng::seed_from_u64(seed);
        while !self.is_over.load(Ordering::Relaxed) {
            let _runs = self.stand.read().unwrap();
            step(&mut rng);
        }
    }

    /// A thread at a part, as a guest's.
    fn write(&self, number: usize) {
        self.until_over(number as u64, |rng| {
            let page = rng.random_range(0..self.pages);
            let word = self.parts[number].word(page * PAGE_BYTES + 8 * number as u64);
            word.fetch_add(1, Ordering::SeqCst);
            self.wrote(page, number).fetch_add(1, Ordering::SeqCst);
        });
    }

    /// The host of the home.
    fn write_for_host(&self) {
        let number = self.parts.len();
        self.until_over(77, |rng| {
            let page = rng.random_range(0..self.pages);
            let wrote = self.wrote(page, number);
            let next = wrote.load(Ordering::SeqCst) + 1;
            let at = page * PAGE_BYTES + 8 * number as u64;
            let home = &self.parts[0].pages;
            home.write(0, at, &next.to_le_bytes(), LONG).unwrap();
            wrote.store(next, Ordering::SeqCst);
        });
    }

    /// The balancer, which also runs during cuts.
    fn move_sets(&self) {
        let mut rng = SmallRng::seed_from_u64(99);
        while !self.is_over.load(Ordering::Relaxed) {
            let first = rng.random_range(0..self.pages);
            let last = (first + rng.random_range(1..40)).min(self.pages);
            let to = part(rng.random_range(0..self.parts.len()));
            let from = rng.random_range(0..self.parts.len());
            let range = first * PAGE_BYTES..last * PAGE_BYTES;
            let pages = &self.parts[from].pages;
            match from {
                // With their directories, for whole segments.
                0 => drop(pages.move_object(0, range, to, LONG).unwrap()),
                _ => pages.move_pages(0, range, to).unwrap(),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Makes a cut; returns it with the expected words in order.
    fn cut(&self) -> (Cut, Vec<u64>) {
        let since = self
            .last
            .lock()
            .unwrap()
            .as_ref()
            .map(|(number, _)| *number);
        let cut = self.parts[0].pages.prepare_cut(since, LONG).unwrap();
        let _all_stand = self.stand.write().unwrap();
        cut.mark(LONG).unwrap();
        let written = self.written.iter();
        (cut, written.map(|it| it.load(Ordering::SeqCst)).collect())
    }

    /// The words of a cut, which has each page at most once; the next cut is relative to
    /// this one.
    fn words_of(&self, cut: &Cut) -> Vec<u64> {
        let count = self.parts.len() + 1;
        let mut words = vec![0; self.written.len()];
        let mut seen = BTreeSet::new();
        let before = self.last.lock().unwrap().take();
        while let Some(piece) = cut.next(LONG).unwrap() {
            let pages = match piece {
                CutPiece::Pages(pages) => pages,
                CutPiece::Unchanged(same) => {
                    let (_, before) = before.as_ref().expect("an earlier cut");
                    for page in same.first as usize..(same.first + same.pages) as usize {
                        assert!(seen.insert(page), "page {page} comes twice");
                        let of = page * count..(page + 1) * count;
                        words[of.clone()].copy_from_slice(&before[of]);
                        self.same.fetch_add(1, Ordering::Relaxed);
                    }
                    continue;
                }
            };
            let rows = pages.bytes.chunks_exact(PAGE_BYTES as usize);
            for (page, bytes) in (pages.first as usize..).zip(rows) {
                assert!(seen.insert(page), "page {page} comes twice");
                for (word, bytes) in bytes.chunks_exact(8).take(count).enumerate() {
                    words[page * count + word] = u64::from_le_bytes(bytes.try_into().unwrap());
                }
            }
        }
        *self.last.lock().unwrap() = Some((cut.number(), words.clone()));
        words
    }

    /// For the duration of `run`.
    fn during(&self, run: impl FnOnce()) {
        std::thread::scope(|scope| {
            for number in 0..self.parts.len() {
                scope.spawn(move || self.write(number));
            }
            scope.spawn(|| self.write_for_host());
            scope.spawn(|| self.move_sets());
            // Also on panic.
            struct Over<'a>(&'a AtomicBool);
            impl Drop for Over<'_> {
                fn drop(&mut self) {
                    self.0.store(true, Ordering::Relaxed);
                }
            }
            let _over = Over(&self.is_over);
            run();
        });
    }
}

/// A cut has the state of one instant, whatever is written, moved and evicted while it is
/// read; no thread waits for the reader.
#[test]
fn a_cut_is_of_one_instant() {
    // Half of them are not accessed at first.
    let all = [
        (1, 64, None),
        (3, 96, None),
        (3, 1024, Some(PART_BYTES_MIN)),
    ];
    for (count, pages, limit) in all {
        let parts = parts(
            count,
            pages,
            HOLD,
            &vec![0; (pages * PAGE_BYTES / 2) as usize],
        );
        parts[0].pages.limit_parts(limit).unwrap();
        let traffic = Traffic::new(&parts, pages);
        traffic.during(|| {
            for round in 0..12 {
                std::thread::sleep(Duration::from_millis(5));
                if round % 4 == 3 {
                    // All pages are sent again.
                    traffic.last.lock().unwrap().take();
                }
                let (cut, expected) = traffic.cut();
                if round % 3 == 1 {
                    // Some pages change before they are read.
                    std::thread::sleep(Duration::from_millis(20));
                }
                let found = traffic.words_of(&cut);
                let wrong = found
                    .iter()
                    .zip(&expected)
                    .position(|(found, word)| found != word);
                assert_eq!(wrong, None, "{count} parts, round {round}");
            }
        });
        let same = traffic.same.load(Ordering::Relaxed);
        assert!(count == 1 || same > 0, "{count} parts, {pages} pages");
        let wrote = |it: &AtomicU64| it.load(Ordering::SeqCst) > 0;
        assert!(traffic.written.iter().any(wrote));
        let last: Vec<u64> = traffic
            .written
            .iter()
            .map(|it| it.load(Ordering::SeqCst))
            .collect();
        for (at, expected) in last.iter().enumerate() {
            let (page, word) = ((at / (count + 1)) as u64, (at % (count + 1)) as u64);
            assert_eq!(parts[0].host_read(page * PAGE_BYTES + 8 * word), *expected);
        }
    }
}

/// An abandoned cut leaves no page protected; there is one cut at a time, at the home;
/// after an error the next cut succeeds.
#[test]
fn cuts_can_be_dropped_at_any_time() {
    let pages = 512;
    let parts = parts(3, pages, HOLD, &vec![5; (pages * PAGE_BYTES) as usize]);
    let range = 0..200 * PAGE_BYTES;
    parts[0].pages.move_object(0, range, part(1), LONG).unwrap();
    let home = &parts[0].pages;
    assert_eq!(
        parts[1].pages.prepare_cut(None, LONG).unwrap_err(),
        SpanError::CutUnavailable
    );
    // No page counts as unchanged since a cut that was not read completely or never
    // existed; since the previous cut, all pages without writes do.
    let mut since = Some(77);
    for (taken, same) in [
        (0, 0),
        (3, 0),
        (usize::MAX, 0),
        (usize::MAX, pages as u32),
        (0, 0),
    ] {
        let cut = home.prepare_cut(since, LONG).unwrap();
        assert_eq!(
            home.prepare_cut(None, LONG).unwrap_err(),
            SpanError::CutUnavailable
        );
        cut.mark(LONG).unwrap();
        let (mut count, mut are_same) = (0, 0);
        while count < taken
            && let Some(piece) = cut.next(LONG).unwrap()
        {
            count += 1;
            if let CutPiece::Unchanged(same) = piece {
                are_same += same.pages;
            }
        }
        assert_eq!(are_same, same, "{taken}");
        since = Some(cut.number());
        drop(cut);
        if taken == usize::MAX && same == 0 {
            continue;
        }
        for part in &parts {
            for page in 0..pages {
                part.word(page * PAGE_BYTES + 64)
                    .fetch_add(1, Ordering::SeqCst);
            }
        }
    }
    // Never marked.
    drop(home.prepare_cut(None, LONG).unwrap());
    let traffic = Traffic::new(&parts, pages);
    for page in 0..pages {
        for word in 0..4 {
            parts[0]
                .word(page * PAGE_BYTES + 8 * word)
                .store(0, Ordering::SeqCst);
        }
    }
    let (cut, expected) = traffic.cut();
    assert!(traffic.words_of(&cut) == expected);
    drop(cut);
    assert!(parts.iter().all(|part| part.pages.failure().is_none()));
}

/// There is no cut while a requested page is withheld; the error is returned in time,
/// threads go on, and the next cut succeeds.
#[test]
fn a_cut_needs_quiescence() {
    let hold = Duration::from_secs(2);
    let parts = parts(3, 16, hold, &[]);
    let late = Duration::from_millis(50);
    parts[1].word(0).store(1, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| parts[2].word(0).fetch_add(1, Ordering::SeqCst));
        std::thread::sleep(late);
        let begun = Instant::now();
        let cut = parts[0].pages.prepare_cut(None, LONG).unwrap();
        assert_eq!(
            cut.mark(late).unwrap_err(),
            SpanError::NotQuiescent { patience: late }
        );
        drop(cut);
        assert!(begun.elapsed() < hold, "{:?}", begun.elapsed());
        assert_eq!(waits.join().unwrap(), 1);
    });
    let cut = parts[0].pages.prepare_cut(None, LONG).unwrap();
    cut.mark(LONG).unwrap();
    let mut words = Vec::new();
    while let Some(CutPiece::Pages(pages)) = cut.next(LONG).unwrap() {
        words.push((
            pages.first,
            u64::from_le_bytes(pages.bytes[..8].try_into().unwrap()),
        ));
    }
    assert_eq!(words, [(0, 2)]);
}

/// Reading a cut ends when the machine ends or loses a part.
#[test]
fn a_lost_part_ends_a_cut() {
    let pages = 512;
    let mut parts = parts(3, pages, HOLD, &vec![5; (pages * PAGE_BYTES) as usize]);
    let range = 0..pages * PAGE_BYTES;
    parts[0].pages.move_object(0, range, part(2), LONG).unwrap();
    let cut = parts[0].pages.prepare_cut(None, LONG).unwrap();
    cut.mark(LONG).unwrap();
    drop(parts.pop());
    let failure = loop {
        match cut.next(LONG) {
            Ok(Some(_)) => {}
            Ok(None) => panic!("more had been asked for"),
            Err(failure) => break failure,
        }
    };
    assert!(matches!(failure, SpanError::Lost { .. }), "{failure:?}");
}
