//! Jobs: owns their numbers, which of them run, and what goes with one that ends.
//!
//! It refuses work for a job that is over.
//!
//! Invariants:
//! 1. Numbers count from 1 and are never given twice; one driver has one running job however often it asks.
//! 2. Of a finished job nothing lives but its detached actors and groups; keys bound to it go with the last such actor.

use std::collections::{BTreeMap, VecDeque};

use ray_ids::{JobId, NodeId};
use ray_wire::{AddJob, DeathCause, GcsReply, JobFinished, JobKey, DEATH_JOB, GCS_ERROR_NOT_FOUND};

use crate::messages::GcsMessage;
use crate::records::{JobRecord, Table};
use crate::state::{done, id_field, invalid, refusal, Gcs};

#[derive(Debug)]
pub(crate) struct Jobs {
    pub(crate) rows: BTreeMap<JobId, JobRecord>,
    pub(crate) next_number: u32,
    pub(crate) finished: VecDeque<JobId>,
}

impl Default for Jobs {
    fn default() -> Self {
        Self {
            rows: BTreeMap::new(),
            next_number: 1,
            finished: VecDeque::new(),
        }
    }
}

impl Jobs {
    pub(crate) fn runs(&self, job: JobId) -> bool {
        self.rows.get(&job).is_some_and(|row| !row.finished)
    }

    /// Whether the job is known to be over; numbers below the next one that are not remembered are over too.
    pub(crate) fn is_over(&self, job: JobId) -> bool {
        match self.rows.get(&job) {
            Some(row) => row.finished,
            None => job.int() < self.next_number,
        }
    }
}

impl Gcs {
    pub(crate) fn add_job(&mut self, node: NodeId, add: AddJob) -> GcsReply {
        let Some(driver) = add.driver else {
            return invalid("a job needs its driver's address");
        };
        if driver.node().ok() != Some(node) || driver.worker().is_err() {
            return invalid("a job is added by the raylet of its driver's node");
        }
        // A finished job of the driver was taken for over while the answer to its registration was lost with a link: the
        // driver has not begun yet and gets another.
        let mut running = self.jobs.rows.iter().filter(|(_, row)| !row.finished);
        if let Some((job, _)) = running.find(|(_, row)| row.driver.as_ref() == Some(&driver)) {
            return GcsReply {
                number: u64::from(job.int()),
                ..done()
            };
        }
        let number = if add.job_number == 0 {
            self.jobs.next_number
        } else {
            add.job_number
        };
        let job = JobId::from_int(number);
        if self.jobs.rows.contains_key(&job) {
            return invalid(format!("job {job} has another driver"));
        }
        if add.job_number != 0 && add.job_number < self.jobs.next_number {
            return invalid(format!("job {job} is over"));
        }
        self.jobs.next_number = number + 1;
        self.store_meta();
        let record = JobRecord {
            driver: Some(driver),
            pid: add.pid,
            config_json: add.config_json,
            start_time_ms: self.now_ms,
            end_time_ms: 0,
            finished: false,
        };
        self.put_row(Table::Jobs, job.as_bytes(), &record);
        self.jobs.rows.insert(job, record);
        self.publish_job(job);
        GcsReply {
            number: u64::from(number),
            ..done()
        }
    }

    pub(crate) fn finish_job_request(&mut self, key: &JobKey) -> GcsReply {
        let Ok(job) = JobId::from_binary(&key.job_id) else {
            return invalid("a job id has 4 bytes");
        };
        if !self.jobs.rows.contains_key(&job) {
            return refusal(GCS_ERROR_NOT_FOUND, format!("job {job} is not known"));
        }
        self.finish_job(job);
        done()
    }

    /// Ends the jobs whose drivers are on `node`, except those in `connected`.
    pub(crate) fn finish_jobs_of_node(&mut self, node: NodeId, connected: Option<&[JobId]>) {
        let on_node = |row: &JobRecord| row.driver.as_ref().and_then(|driver| driver.node().ok()) == Some(node);
        let over: Vec<JobId> = self
            .jobs
            .rows
            .iter()
            .filter(|(job, row)| !row.finished && on_node(row) && !connected.is_some_and(|jobs| jobs.contains(job)))
            .map(|(job, _)| *job)
            .collect();
        for job in over {
            self.finish_job(job);
        }
    }

    /// Ends a job with everything that goes with it. Repeating it is harmless.
    pub(crate) fn finish_job(&mut self, job: JobId) {
        let now = self.now_ms;
        let Some(row) = self.jobs.rows.get_mut(&job).filter(|row| !row.finished) else {
            return;
        };
        row.finished = true;
        row.end_time_ms = now;
        let record = row.clone();
        self.put_row(Table::Jobs, job.as_bytes(), &record);
        self.jobs.finished.push_back(job);
        let cause = DeathCause {
            kind: DEATH_JOB,
            message: format!("its job {job} is over"),
            ..DeathCause::default()
        };
        for actor in self.actors.of_job(job) {
            if self.actors.rows.get(&actor).is_some_and(|row| !row.creation.detached) {
                self.kill_actor(actor, cause.clone());
            }
        }
        self.remove_groups_of_job(job);
        self.drop_keys_of_finished_job(job);
        let message = GcsMessage::JobFinished(JobFinished {
            job_id: id_field(job.as_bytes()),
        });
        self.send_to_all(None, &message);
        self.publish_job(job);
        self.forget_old_jobs();
    }

    fn forget_old_jobs(&mut self) {
        while self.jobs.finished.len() as u64 > self.settings.maximum_finished_jobs {
            // A detached actor that is created again needs its job's configuration.
            let actors = &self.actors;
            let lives = |job: &JobId| {
                actors
                    .of_job(*job)
                    .iter()
                    .any(|id| actors.rows.get(id).is_some_and(|row| !row.is_dead()))
            };
            let Some(at) = self.jobs.finished.iter().position(|job| !lives(job)) else {
                return;
            };
            if let Some(oldest) = self.jobs.finished.remove(at) {
                self.jobs.rows.remove(&oldest);
                self.delete_row(Table::Jobs, oldest.as_bytes());
            }
        }
    }

    /// Drops the keys bound to a finished job once no detached actor of it may need them any more.
    pub(crate) fn drop_keys_of_finished_job(&mut self, job: JobId) {
        let needed = self
            .actors
            .of_job(job)
            .into_iter()
            .any(|actor| self.actors.rows.get(&actor).is_some_and(|row| !row.is_dead()));
        if self.jobs.is_over(job) && !needed {
            self.kv_drop_job(job);
        }
    }

    /// What a worker needs of its job's configuration.
    pub(crate) fn job_config(&self, job: JobId) -> String {
        self.jobs
            .rows
            .get(&job)
            .map(|row| row.config_json.clone())
            .unwrap_or_default()
    }
}
