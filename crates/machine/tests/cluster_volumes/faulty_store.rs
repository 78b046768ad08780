//! A store that fails, loses answers and lists old content, as its plan says.

use super::*;

/// How a store treats the next modifying requests.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Plan {
    Works,
    /// All requests fail after a number of them; the first one that fails is executed
    /// nevertheless if `done`.
    Fails {
        after: u32,
        done: bool,
    },
    /// Each request fails with this probability, in percent, half of them after
    /// execution.
    Flaky(u32),
    /// All objects disappear after a number of requests, and later ones are executed
    /// nonetheless: a folder that is unmounted during a commit.
    Vanishes(u32),
}

/// An in-memory store that fails as configured, and yields to other tasks.
#[derive(Debug)]
pub(crate) struct Faulty {
    pub(crate) inner: InMemory,
    /// The content before it disappeared.
    pub(crate) away: tokio::sync::Mutex<Option<InMemory>>,
    pub(crate) state: Mutex<(Plan, ChaCha8Rng)>,
    pub(crate) yields: bool,
}

impl Faulty {
    pub(crate) fn new(seed: u64, yields: bool) -> Arc<Self> {
        Arc::new(Faulty {
            inner: InMemory::new(),
            away: tokio::sync::Mutex::default(),
            state: Mutex::new((Plan::Works, ChaCha8Rng::seed_from_u64(seed))),
            yields,
        })
    }

    pub(crate) fn plan(&self, plan: Plan) {
        self.state.lock().unwrap().0 = plan;
    }

    /// Whether the request fails before or after execution.
    pub(crate) fn outcome(&self) -> (bool, bool) {
        let mut state = self.state.lock().unwrap();
        let (plan, random) = &mut *state;
        match plan {
            Plan::Works => (false, false),
            Plan::Fails { after: 0, done } => {
                let done = std::mem::take(done);
                (!done, true)
            }
            Plan::Fails { after, .. } => {
                *after -= 1;
                (false, false)
            }
            Plan::Flaky(percent) => {
                let fails = random.random_ratio(*percent, 100);
                (fails && random.random(), fails)
            }
            Plan::Vanishes(_) => (false, false),
        }
    }

    /// Removes all objects if due.
    pub(crate) async fn vanish(&self) {
        let due = match &mut self.state.lock().unwrap().0 {
            plan @ Plan::Vanishes(0) => {
                *plan = Plan::Works;
                true
            }
            Plan::Vanishes(after) => {
                *after -= 1;
                false
            }
            _ => false,
        };
        if due {
            *self.away.lock().await = Some(self.inner.fork());
            clear(&self.inner).await;
        }
    }

    /// Restores the content that disappeared, in place of the present one.
    pub(crate) async fn put_back(&self) {
        let Some(away) = self.away.lock().await.take() else {
            return;
        };
        clear(&self.inner).await;
        let all: Vec<ObjectMeta> = away.list(None).try_collect().await.unwrap();
        for object in all {
            let bytes = away.get(&object.location).await.unwrap().bytes().await;
            let put = self.inner.put(&object.location, bytes.unwrap().into());
            put.await.unwrap();
        }
    }

    pub(crate) async fn others_first(&self) {
        while self.yields && self.state.lock().unwrap().1.random_ratio(1, 2) {
            tokio::task::yield_now().await;
        }
    }
}

pub(crate) async fn clear(store: &InMemory) {
    let all: Vec<ObjectMeta> = store.list(None).try_collect().await.unwrap();
    for object in all {
        store.delete(&object.location).await.unwrap();
    }
}

pub(crate) fn failure() -> Error {
    Error::Generic {
        store: "faulty",
        source: "as it was told".into(),
    }
}

impl std::fmt::Display for Faulty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("faulty")
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        opts: PutOptions,
    ) -> Result<PutResult> {
        self.others_first().await;
        self.vanish().await;
        let (before, after) = self.outcome();
        if before {
            return Err(failure());
        }
        let put = self.inner.put_opts(location, payload, opts).await;
        if after { Err(failure()) } else { put }
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.others_first().await;
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        match self.outcome() {
            (true, _) => Box::pin(futures::stream::iter([Err(failure())])),
            _ => self.inner.delete_stream(locations),
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}
