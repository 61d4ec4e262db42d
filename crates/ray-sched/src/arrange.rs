//! Arranging bundles over nodes: owns the search behind the four placement strategies.
//!
//! It refuses nothing and explains nothing: it finds an arrangement, or shows that there is none, or gives up after a
//! named amount of work. One node and different nodes are decided exactly (a sum, a matching); packing several
//! bundles on several nodes is a bin packing, for which a greedy pass is followed by a bounded search.
//!
//! Invariants:
//! 1. An arrangement gives each bundle a site with matching labels, within what is free there, by its strategy.
//! 2. `Impossible` is proven; what was not searched to the end is `Unknown`.

use crate::bundles::{BundleRequest, PlacementConstraints, PlacementStrategy};
use crate::labels::Labels;
use crate::quantity::Quantity;
use crate::resource_set::{ResourceName, ResourceSet};
use crate::view::NodeView;
use ray_ids::NodeId;
use rustc_hash::{FxHashMap, FxHashSet};
use std::cmp::Reverse;
use std::rc::Rc;

/// How many sites the search tries before it gives up: a few milliseconds of a control plane's time.
const SEARCH_LIMIT_TRIES: usize = 20_000;
/// How many bundles the search takes on: it goes one call deeper for each.
const SEARCH_LIMIT_BUNDLES: usize = 500;

/// A node as the search sees it.
#[derive(Debug, Clone)]
pub(crate) struct Site<'a> {
    pub(crate) id: NodeId,
    pub(crate) node: &'a NodeView,
    pub(crate) free: ResourceSet,
    /// Bundles of the same group there already.
    pub(crate) bundles: usize,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Of each bundle, the index of its site.
    Found(Vec<usize>),
    /// There is no arrangement; so many bundles could get a site by the strategy, where that was counted.
    Impossible { placeable: usize },
    /// Not found within the limit.
    Unknown,
}

/// Arranges all bundles over the sites. Earlier sites are preferred among equals.
pub(crate) fn arrange(
    sites: &[Site<'_>],
    bundles: &[BundleRequest],
    strategy: PlacementStrategy,
    constraints: PlacementConstraints<'_>,
) -> Outcome {
    let problem = Problem::new(sites, bundles);
    match strategy {
        PlacementStrategy::StrictPack => problem.on_one_site(constraints),
        PlacementStrategy::StrictSpread => problem.on_different_sites(),
        PlacementStrategy::Pack => problem.or_search(problem.pack(), true),
        PlacementStrategy::Spread => problem.or_search(problem.spread(), false),
    }
}

/// What one site would hold.
struct Held {
    bundles: Vec<usize>,
    left: ResourceSet,
    wants_gpu: bool,
}

struct Problem<'a> {
    sites: &'a [Site<'a>],
    bundles: &'a [BundleRequest],
    /// Bundles, hardest first: those that want the largest part of what is free of some resource.
    order: Vec<usize>,
    /// Of each bundle, the resource of which it wants the largest part.
    scarcest: Vec<ResourceName>,
    all: ResourceSet,
    all_free: ResourceSet,
}

impl<'a> Problem<'a> {
    fn new(sites: &'a [Site<'a>], bundles: &'a [BundleRequest]) -> Self {
        let mut all_free = ResourceSet::new();
        sites.iter().for_each(|site| all_free.add_all(&site.free));
        let mut all = ResourceSet::new();
        bundles.iter().for_each(|bundle| all.add_all(&bundle.resources));
        let part = |(name, wanted): (&ResourceName, Quantity)| {
            (
                wanted.raw() as f64 / all_free.get(name).raw().max(1) as f64,
                name.clone(),
            )
        };
        let parts: Vec<(f64, ResourceName)> = bundles
            .iter()
            .map(|bundle| {
                bundle
                    .resources
                    .iter()
                    .map(part)
                    .max_by(|a, b| a.0.total_cmp(&b.0))
                    .unwrap_or_default()
            })
            .collect();
        let mut order: Vec<usize> = (0..bundles.len()).collect();
        order.sort_by(|a, b| parts[*b].0.total_cmp(&parts[*a].0).then(a.cmp(b)));
        let scarcest = parts.into_iter().map(|(_, name)| name).collect();
        Self {
            sites,
            bundles,
            order,
            scarcest,
            all,
            all_free,
        }
    }

    fn fits(&self, site: usize, bundle: usize, free: &ResourceSet) -> bool {
        let request = &self.bundles[bundle];
        free.covers(&request.resources) && request.label_selector.matches(&self.sites[site].node.labels)
    }

    /// How well a site suits a bundle, least first: nodes with GPUs are left to those who want GPUs, and then the one
    /// with least left over of what is scarcest comes first.
    fn misfit(&self, bundle: usize, site: usize, free: &ResourceSet) -> (bool, Quantity, usize) {
        let name = &self.scarcest[bundle];
        let left = free.get(name) - self.bundles[bundle].resources.get(name);
        (!self.wants_gpu(bundle) && self.sites[site].node.has_gpus(), left, site)
    }

    fn on_one_site(&self, constraints: PlacementConstraints<'_>) -> Outcome {
        let allowed = |site: &Site<'_>| constraints.occupied.iter().all(|occupied| *occupied == site.id);
        let labelled = |site: &Site<'_>| {
            self.bundles
                .iter()
                .all(|bundle| bundle.label_selector.matches(&site.node.labels))
        };
        let fitting = (0..self.sites.len()).filter(|at| {
            let site = &self.sites[*at];
            allowed(site) && site.free.covers(&self.all) && labelled(site)
        });
        let first = self.order[0];
        let best = fitting.min_by_key(|at| {
            let site = &self.sites[*at];
            (
                constraints.soft_target_node != Some(site.id),
                self.misfit(first, *at, &site.free),
            )
        });
        match best {
            Some(site) => Outcome::Found(vec![site; self.bundles.len()]),
            None => Outcome::Impossible { placeable: 0 },
        }
    }

    fn on_different_sites(&self) -> Outcome {
        let matched = self.matching();
        let placeable = matched.iter().flatten().count();
        match matched.into_iter().collect::<Option<Vec<usize>>>() {
            Some(chosen) => Outcome::Found(chosen),
            None => Outcome::Impossible { placeable },
        }
    }

    /// As many bundles as possible on sites of their own, none on an occupied one: a maximum bipartite matching by
    /// augmenting paths, which takes each bundle's best site while that is free.
    fn matching(&self) -> Vec<Option<usize>> {
        let mut holder: Vec<Option<usize>> = vec![None; self.sites.len()];
        let unoccupied: Vec<usize> = (0..self.sites.len())
            .filter(|site| self.sites[*site].bundles == 0)
            .collect();
        // Bundles of one kind, as most are, share their list of sites.
        let mut lists: FxHashMap<&BundleRequest, Rc<Vec<usize>>> = FxHashMap::default();
        let mut choices: Vec<Rc<Vec<usize>>> = Vec::with_capacity(self.bundles.len());
        for (bundle, request) in self.bundles.iter().enumerate() {
            let list = lists.entry(request).or_insert_with(|| {
                let fits = |site: &usize| self.fits(*site, bundle, &self.sites[*site].free);
                let mut fitting: Vec<usize> = unoccupied.iter().copied().filter(fits).collect();
                fitting.sort_by_cached_key(|site| self.misfit(bundle, *site, &self.sites[*site].free));
                Rc::new(fitting)
            });
            choices.push(list.clone());
        }
        for bundle in &self.order {
            let mut tried = vec![false; self.sites.len()];
            augment(*bundle, &choices, &mut holder, &mut tried);
        }
        let mut matched = vec![None; self.bundles.len()];
        for (site, bundle) in holder.into_iter().enumerate() {
            if let Some(bundle) = bundle {
                matched[bundle] = Some(site);
            }
        }
        matched
    }

    /// Different sites first, and what has none of its own goes where the fewest bundles are.
    fn spread(&self) -> Option<Vec<usize>> {
        let mut chosen = self.matching();
        let mut free: Vec<ResourceSet> = self.sites.iter().map(|site| site.free.clone()).collect();
        let mut counts: Vec<usize> = self.sites.iter().map(|site| site.bundles).collect();
        for (bundle, site) in chosen.iter().enumerate() {
            if let Some(site) = site {
                free[*site].checked_sub(&self.bundles[bundle].resources);
                counts[*site] += 1;
            }
        }
        for bundle in &self.order {
            if chosen[*bundle].is_some() {
                continue;
            }
            let fitting = (0..self.sites.len()).filter(|site| self.fits(*site, *bundle, &free[*site]));
            let best = fitting.min_by_key(|site| (counts[*site], self.misfit(*bundle, *site, &free[*site])))?;
            free[best].checked_sub(&self.bundles[*bundle].resources);
            counts[best] += 1;
            chosen[*bundle] = Some(best);
        }
        chosen.into_iter().collect()
    }

    /// Again and again the site that holds most of the remaining bundles; of those an occupied one, and then the one
    /// with least left over of what is scarcest.
    fn pack(&self) -> Option<Vec<usize>> {
        let mut chosen: Vec<Option<usize>> = vec![None; self.bundles.len()];
        let mut remaining = self.order.clone();
        let mut unused: Vec<usize> = (0..self.sites.len()).collect();
        while let Some(first) = remaining.first().copied() {
            let name = &self.scarcest[first];
            // Sites alike hold the same, so each kind is tried once: most clusters have few kinds of nodes.
            let mut kinds: FxHashSet<(&ResourceSet, &Labels, bool)> = FxHashSet::default();
            let mut holds_nothing = vec![false; self.sites.len()];
            let mut best: Option<(usize, Held)> = None;
            for site in unused.iter().copied() {
                let Site {
                    node, free, bundles, ..
                } = &self.sites[site];
                if !kinds.insert((free, &node.labels, *bundles > 0)) {
                    continue;
                }
                let held = self.held(site, &remaining);
                holds_nothing[site] = held.bundles.is_empty();
                let key = |site: usize, held: &Held| {
                    let avoided = self.sites[site].node.has_gpus() && !held.wants_gpu;
                    (
                        Reverse(held.bundles.len()),
                        self.sites[site].bundles == 0,
                        avoided,
                        held.left.get(name),
                    )
                };
                if best
                    .as_ref()
                    .is_none_or(|(other, others)| key(site, &held) < key(*other, others))
                {
                    best = Some((site, held));
                }
            }
            let (site, held) = best.filter(|(_, held)| !held.bundles.is_empty())?;
            // What holds none of these bundles holds none of fewer.
            unused.retain(|other| *other != site && !holds_nothing[*other]);
            let placed: FxHashSet<usize> = held.bundles.into_iter().collect();
            remaining.retain(|bundle| !placed.contains(bundle));
            placed.into_iter().for_each(|bundle| chosen[bundle] = Some(site));
        }
        chosen.into_iter().collect()
    }

    /// Which of the remaining bundles an unused site holds, hardest first.
    fn held(&self, site: usize, remaining: &[usize]) -> Held {
        let mut held = Held {
            bundles: Vec::new(),
            left: self.sites[site].free.clone(),
            wants_gpu: false,
        };
        for bundle in remaining.iter().copied() {
            if self.fits(site, bundle, &held.left) {
                held.left.checked_sub(&self.bundles[bundle].resources);
                held.wants_gpu |= self.wants_gpu(bundle);
                held.bundles.push(bundle);
            }
        }
        held
    }

    fn wants_gpu(&self, bundle: usize) -> bool {
        !self.bundles[bundle].resources.get(&ResourceName::GPU).is_zero()
    }

    /// What the greedy pass found, or what the search finds.
    fn or_search(&self, found: Option<Vec<usize>>, together: bool) -> Outcome {
        if let Some(chosen) = found {
            return Outcome::Found(chosen);
        }
        let homeless =
            |bundle: usize| !(0..self.sites.len()).any(|site| self.fits(site, bundle, &self.sites[site].free));
        if !self.all_free.covers(&self.all) || (0..self.bundles.len()).any(homeless) {
            return Outcome::Impossible { placeable: 0 };
        }
        if self.bundles.len() > SEARCH_LIMIT_BUNDLES {
            return Outcome::Unknown;
        }
        let mut search = Search {
            problem: self,
            free: self.sites.iter().map(|site| site.free.clone()).collect(),
            counts: self.sites.iter().map(|site| site.bundles).collect(),
            chosen: vec![0; self.bundles.len()],
            tries_left: SEARCH_LIMIT_TRIES,
            together,
        };
        match search.place_from(0) {
            Some(true) => Outcome::Found(search.chosen),
            Some(false) => Outcome::Impossible { placeable: 0 },
            None => Outcome::Unknown,
        }
    }
}

/// Gives `bundle` a site, moving others to other sites of theirs where that makes room.
fn augment(bundle: usize, choices: &[Rc<Vec<usize>>], holder: &mut [Option<usize>], tried: &mut [bool]) -> bool {
    // First a free site, so that the common case moves no one.
    if let Some(site) = choices[bundle].iter().copied().find(|site| holder[*site].is_none()) {
        holder[site] = Some(bundle);
        return true;
    }
    for site in choices[bundle].iter() {
        if std::mem::replace(&mut tried[*site], true) {
            continue;
        }
        let movable = holder[*site].is_none_or(|other| augment(other, choices, holder, tried));
        if movable {
            holder[*site] = Some(bundle);
            return true;
        }
    }
    false
}

struct Search<'a> {
    problem: &'a Problem<'a>,
    free: Vec<ResourceSet>,
    counts: Vec<usize>,
    chosen: Vec<usize>,
    tries_left: usize,
    together: bool,
}

impl Search<'_> {
    /// Places the bundles from `depth` of the order on: whether it can, or `None` where the limit was reached first.
    fn place_from(&mut self, depth: usize) -> Option<bool> {
        let Some(bundle) = self.problem.order.get(depth).copied() else {
            return Some(true);
        };
        let problem = self.problem;
        self.tries_left = self.tries_left.checked_sub(problem.sites.len())?;
        let mut fitting: Vec<usize> = (0..problem.sites.len())
            .filter(|site| problem.fits(*site, bundle, &self.free[*site]))
            .collect();
        let most = if self.together { usize::MAX } else { 0 };
        fitting.sort_by_cached_key(|site| {
            // Together the fullest site comes first, apart the emptiest.
            (
                self.counts[*site].abs_diff(most),
                problem.misfit(bundle, *site, &self.free[*site]),
            )
        });
        let mut failed: Vec<usize> = Vec::new();
        for site in fitting {
            // What failed on one site fails on another just like it.
            let alike = |other: &usize| {
                self.free[*other] == self.free[site]
                    && problem.sites[*other].node.labels == problem.sites[site].node.labels
            };
            if failed.iter().any(alike) {
                continue;
            }
            let before = self.free[site].clone();
            self.free[site].checked_sub(&problem.bundles[bundle].resources);
            self.counts[site] += 1;
            self.chosen[bundle] = site;
            let placed = self.place_from(depth + 1);
            if placed != Some(false) {
                return placed;
            }
            self.free[site] = before;
            self.counts[site] -= 1;
            failed.push(site);
        }
        Some(false)
    }
}
